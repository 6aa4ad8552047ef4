"""From a row of a source to clips: whole, cut, or split at pauses; reading in workers; the limit on skipped clips."""

import dataclasses
import hashlib
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from llama_mimi.audio.reading import SHORTER, AudioError, Waveform, read_audio
from llama_mimi.audio.silence import split_at_pauses
from llama_mimi.common.distributed import end_with_parent
from llama_mimi.common.errors import UserError, first_line
from llama_mimi.common.files import file_system
from llama_mimi.corpora.source import Row, Source
from llama_mimi.corpora.where import RowFilter

SECONDS_AT_ONCE = 3600.0  # of a long recording that is split: 345 MB at 24 kHz
ROUNDED_SECONDS = 0.1  # by which manifests may be wrong
HASH_BYTES = 16
MIN_JUDGED_CLIPS = 100  # clips that are read before the fraction of skipped ones is judged
MAX_NAMED_CLIPS = 20  # skipped clips that are named one by one; all are counted


@dataclass(frozen=True)
class SkippedClip:
    """A row that is not used, with a short category and a sentence that names it."""

    reason: str
    message: str
    is_filtered: bool = False  # it could be used, but was not wanted


@dataclass(frozen=True)
class AudioClip:
    """One usable clip; ``audio_warnings`` as `llama_mimi.audio.reading.Waveform`."""

    name: str  # id, path or place
    samples_S: torch.Tensor  # mono float32 at the codec's rate
    is_cut: bool  # the recording is longer
    text: str | None
    speaker: str | None = None
    audio_warnings: tuple[str, ...] = ()
    audio_hash: bytes | None = None  # of the samples

    # PyTorch sends a tensor to another process through /dev/shm, which Docker limits to 64 MB. Without space there,
    # training would wait for ever. A NumPy array goes through the pipe between the processes.
    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"samples_S": self.samples_S.numpy()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, samples_S=torch.from_numpy(state["samples_S"]))


class AudioReader:
    """Reader of the rows of a source as waveforms.

    Args:
        sample_rate_hz, frame_size: of the codec; clips shorter than a frame are skipped.
        max_frames: longer clips are cut, or with ``splits`` split at pauses into several clips without texts.
        with_text: skip rows without a transcript.
    """

    def __init__(
        self,
        source: Source,
        *,
        sample_rate_hz: int,
        frame_size: int,
        max_frames: int,
        with_text: bool = False,
        row_filter: RowFilter | None = None,
        splits: bool = False,
    ) -> None:
        self.source, self.name, self.fingerprint = source, source.name, source.fingerprint
        self._filter, self._splits = row_filter or RowFilter(), splits
        self._sample_rate_hz, self._frame_size, self._with_text = sample_rate_hz, frame_size, with_text
        self._max_seconds = max_frames * frame_size / sample_rate_hz

    @property
    def rows_per_unit(self) -> np.ndarray:
        """Rows of each unit; a `UserError` if they are not known before reading, as of tars."""
        rows = [unit.num_rows for unit in self.source.units]
        if None in rows:
            raise UserError(f"training cannot read the tars of '{self.name}'; tokenise it first")
        return np.array(rows, dtype=np.int64)

    def read(self, unit: int) -> Sequence[Row]:
        """Return all rows of a unit."""
        return list(self.source.rows(unit))

    def clips(self, row: Row) -> list[AudioClip | SkippedClip]:
        """Return the clips of a row, or one skipped clip with the reason why it cannot be used."""
        name = row["name"]
        try:
            if not row.get("problem"):
                if (reason := self._filter.of_values(row)) is not None:
                    return [_filtered(name, reason)]
                if self._with_text and not row.get("text"):
                    return [SkippedClip("no text", f"'{name}' has no text")]
            if self._splits:
                return self._split(row)
            return [self._clip(name, read_row(row, self._sample_rate_hz, max_seconds=self._max_seconds), row)]
        except AudioError as error:
            return [SkippedClip(error.reason, str(error))]
        except Exception as error:  # one odd row in a million must not end the run
            problem = f"{type(error).__name__}: {first_line(error)[:200]}"
            return [SkippedClip("unexpected", f"'{name}' cannot be read ({problem})")]

    def _split(self, row: Row) -> list[AudioClip | SkippedClip]:
        """Split a recording, an hour at a time, so that memory has a limit."""
        parts: list[Waveform] = []
        begin, left, rate_hz = row.get("offset") or 0.0, row.get("duration"), self._sample_rate_hz
        goes_on = True
        while goes_on:
            at_once = max(SECONDS_AT_ONCE, 2 * self._max_seconds)
            waveform = read_row(row | {"offset": begin, "duration": left}, rate_hz, max_seconds=at_once)
            goes_on = waveform.is_cut and SHORTER not in waveform.audio_warnings
            ends = split_at_pauses(waveform.samples_S, rate_hz, self._max_seconds)
            ends = ends[:-1] if goes_on else ends  # where it goes on, the last has no pause at its end
            for start, end in itertools.pairwise([0, *ends]):
                part: dict[str, Any] = {"samples_S": waveform.samples_S[start:end].clone()}
                if goes_on or end != ends[-1]:
                    part |= {"is_cut": True, "audio_warnings": tuple({*waveform.audio_warnings} - {SHORTER})}
                parts.append(dataclasses.replace(waveform, **part))
            begin += ends[-1] / rate_hz
            left = None if left is None else left - ends[-1] / rate_hz
        if len(parts) == 1:
            return [self._clip(row["name"], parts[0], row)]
        without_text = row | {"text": None}
        return [self._clip(f"{row['name']}_{number:05d}", part, without_text) for number, part in enumerate(parts)]

    def _clip(self, name: str, waveform: Waveform, row: Row) -> AudioClip | SkippedClip:
        is_longer = waveform.is_cut and SHORTER not in waveform.audio_warnings
        if (reason := self._filter.of_length(waveform.seconds, is_cut=is_longer)) is not None:
            return _filtered(name, reason)
        if len(waveform.samples_S) < self._frame_size:
            return SkippedClip("too short", f"'{name}' is {waveform.seconds:.3f} s, less than a frame of the codec")
        audio_hash = hashlib.blake2b(memoryview(waveform.samples_S.numpy()), digest_size=HASH_BYTES).digest()
        of_row = row.get("text"), row.get("speaker"), waveform.audio_warnings, audio_hash
        return AudioClip(name, waveform.samples_S, waveform.is_cut, *of_row)


def _filtered(name: str, reason: str) -> SkippedClip:
    return SkippedClip(reason, f"'{name}' was left out: {reason}", is_filtered=True)


def read_row(row: Row, sample_rate_hz: int | None, *, max_seconds: float) -> Waveform:
    """Read the audio of a row, or its part of a recording; arguments as `llama_mimi.audio.reading.read_audio`.

    A part that ends with its row is not cut, although the recording goes on; one that ends before its row is cut.

    Raises:
        AudioError: it cannot be used.
    """
    name, audio, duration = row["name"], row.get("audio"), row.get("duration")
    if row.get("problem"):
        raise AudioError("damaged row", f"'{name}' cannot be used: {row['problem']}")
    if audio is None:
        raise AudioError("no audio", f"'{name}' has neither audio bytes nor a path")
    if duration == 0:
        raise AudioError("too short", f"'{name}' has a duration of 0 s")
    if isinstance(audio, str) and "://" in audio:
        fs, bare = file_system(audio)
        try:
            audio = fs.cat_file(bare)
        except OSError as error:
            raise AudioError("missing", f"'{name}' cannot be opened ({error}); check its path") from error
    seconds, start = math.inf if duration is None else duration, row.get("offset") or 0.0
    limit = min(seconds, max_seconds)
    waveform = read_audio(audio, sample_rate_hz, start_seconds=start, max_seconds=limit, name=name)
    if seconds > max_seconds:
        return waveform
    is_short = waveform.seconds < seconds - ROUNDED_SECONDS
    return dataclasses.replace(
        waveform, is_cut=is_short, audio_warnings=waveform.audio_warnings + (SHORTER,) * is_short
    )


class _WithErrors(IterableDataset):
    """A dataset whose `UserError` is its last item: an exception of a worker would arrive with its traceback."""

    def __init__(self, dataset: Iterable[Any]) -> None:
        self._dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self._dataset
        except UserError as error:
            yield UserError(str(error))


def read_in_workers(dataset: Iterable[Any], **workers: Any) -> Iterator[Any]:
    """Yield the items of a dataset, read in worker processes; ``workers`` are arguments of PyTorch's DataLoader.

    Raises:
        UserError: the dataset raised it, in whichever process.
    """
    # PyTorch draws a seed for the workers, which must not advance the generator of training.
    options: dict[str, Any] = {"batch_size": None, "collate_fn": _unchanged, "generator": torch.Generator(), **workers}
    for item in DataLoader(_WithErrors(dataset), worker_init_fn=partial(_end_with, os.getpid()), **options):
        if isinstance(item, UserError):
            raise item
        yield item


def _unchanged(item: Any) -> Any:
    return item


def _end_with(parent: int, worker: int) -> None:
    """End a worker with the process that reads from it, even if that is killed; it would wait for ever to send."""
    end_with_parent()
    if os.getppid() != parent:  # the parent was killed before
        os._exit(1)


def is_too_many(num_skipped: int, num_read: int, max_skip_fraction: float, *, is_whole: bool, is_end: bool) -> bool:
    """Return True if more than the allowed fraction of the clips was skipped.

    Clips before the end, or of one rank of several, are a sample of the corpus: they may exceed the allowed number by
    three standard deviations and one. Fewer than `MIN_JUDGED_CLIPS` clips are judged only at the end, where they
    count as that many, or if no clip may be skipped.

    Args:
        is_whole: this process reads the whole corpus.
        is_end: there are no more clips.
    """
    allowed = max_skip_fraction * max(num_read, MIN_JUDGED_CLIPS)
    if not (is_end and is_whole) and max_skip_fraction:
        allowed += 3 * math.sqrt(allowed) + 1
    return (is_end or num_read >= MIN_JUDGED_CLIPS or not max_skip_fraction) and num_skipped > allowed
