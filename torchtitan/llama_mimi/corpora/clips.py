"""Read the rows of a source as clips, in worker processes, and limit the fraction of skipped clips."""

import dataclasses
import hashlib
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from llama_mimi.audio.reading import SHORTER, AudioError, Waveform, read_audio
from llama_mimi.audio.silence import split_at_pauses
from llama_mimi.common.distributed import end_with_parent
from llama_mimi.common.errors import UserError, first_line
from llama_mimi.common.files import file_system
from llama_mimi.corpora.formats import open_source
from llama_mimi.corpora.source import Row, Source
from llama_mimi.corpora.where import RowFilter

MAX_RECORDING_SECONDS = 86_400.0  # maximum length of a recording to split; an hour takes up to 690 MB of memory
ROUNDED_SECONDS = 0.1  # tolerance for durations in manifests
HASH_BYTES = 16
MIN_JUDGED_CLIPS = 100  # clips to read before the fraction of skipped clips is checked
MAX_NAMED_CLIPS = 20  # skipped clips that are printed; all are counted


@dataclass(frozen=True)
class SkippedClip:
    """Row that was skipped or filtered out."""

    reason: str  # category for the counts
    message: str  # sentence with the row's name
    is_filtered: bool = False  # the row is usable, but a filter excludes it


@dataclass(frozen=True)
class CodedClip:
    """One usable clip: codes (a row of a shard), audio to encode, or a text."""

    name: str  # id, path or position
    codes_TQ: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.uint16))
    seconds: float = 0.0  # length of the audio; 0 if the clip was read from a shard
    is_cut: bool = False  # True if the recording is longer than the clip
    text: str | None = None
    speaker: str | None = None
    audio_warnings: tuple[str, ...] = ()  # see `Waveform`
    audio_hash: bytes | None = None  # hash of the samples, 16 bytes
    # Mono float32 at the codec's rate. PyTorch would send a tensor to another process through /dev/shm, which Docker
    # limits to 64 MB. If /dev/shm is full, a worker hangs. An array is sent through a pipe.
    samples_S: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))


@dataclass
class SourceReader:
    """Base class of the readers that turn the rows of a source into clips for training."""

    source: Source

    def __post_init__(self) -> None:
        self.name, self.fingerprint = self.source.name, self.source.fingerprint

    @property
    def rows_per_unit(self) -> np.ndarray:
        """Number of rows in each unit (U,). Raise a `UserError` for tar files, because their rows are not counted."""
        rows = [unit.num_rows for unit in self.source.units]
        if None in rows:
            remedy = "run scripts/tokenize_corpus.py, or convert a corpus of texts to JSONL"
            raise UserError(f"training cannot read the tar files of '{self.name}'; {remedy}")
        return np.array(rows, dtype=np.int64)

    def read(self, unit: int) -> Sequence[Row]:
        """Return all rows of a unit."""
        return list(self.source.rows(unit))


@dataclass
class AudioReader(SourceReader):
    """Reader of audio."""

    _: KW_ONLY
    sample_rate_hz: int  # rate of the codec
    frame_size: int  # samples in one codec frame; shorter clips are skipped
    max_frames: int  # longer clips are cut, or split
    with_text: bool = False  # skip rows without a transcript
    row_filter: RowFilter = field(default_factory=RowFilter)
    splits: bool = False  # split long recordings at pauses into several clips without texts

    def __post_init__(self) -> None:
        super().__post_init__()
        self._max_seconds = self.max_frames * self.frame_size / self.sample_rate_hz

    def clips(self, row: Row) -> list[CodedClip | SkippedClip]:
        """Return the clips of a row, or one skipped clip with a reason."""
        name = row["name"]
        try:
            if not row.get("problem"):
                if (reason := self.row_filter.of_values(row)) is not None:
                    return [SkippedClip(reason, name, is_filtered=True)]
                if self.with_text and not row.get("text"):
                    return [SkippedClip("no text", f"'{name}' has no text", is_filtered=True)]
            if self.splits:
                return self._split(row)
            return [self._clip(name, read_row(row, self.sample_rate_hz, max_seconds=self._max_seconds), row)]
        except AudioError as error:
            return [SkippedClip(error.reason, str(error))]
        except Exception as error:  # a single bad row must not stop the run
            problem = f"{type(error).__name__}: {first_line(error)[:200]}"
            return [SkippedClip("unexpected", f"'{name}' cannot be read ({problem})")]

    def _split(self, row: Row) -> list[CodedClip | SkippedClip]:
        """Split a long recording at pauses into clips without text; a short recording is one clip with its text."""
        waveform = read_row(row, self.sample_rate_hz, max_seconds=MAX_RECORDING_SECONDS)
        if waveform.is_cut and SHORTER not in waveform.audio_warnings:
            hours = MAX_RECORDING_SECONDS / 3600
            raise AudioError("too long", f"'{row['name']}' is longer than {hours:g} hours; split it into shorter files")
        ends = split_at_pauses(waveform.samples_S, self.sample_rate_hz, self._max_seconds)
        if len(ends) == 1:
            return [self._clip(row["name"], waveform, row)]
        warnings = tuple(warning for warning in waveform.audio_warnings if warning != SHORTER)
        clips = []
        for number, (start, end) in enumerate(itertools.pairwise([0, *ends])):
            part = dataclasses.replace(waveform, samples_S=waveform.samples_S[start:end])
            if end != ends[-1]:
                part = dataclasses.replace(part, is_cut=True, audio_warnings=warnings)
            clips.append(self._clip(f"{row['name']}_{number:05d}", part, row | {"text": None}))
        return clips

    def _clip(self, name: str, waveform: Waveform, row: Row) -> CodedClip | SkippedClip:
        is_longer = waveform.is_cut and not self.splits and SHORTER not in waveform.audio_warnings
        if (reason := self.row_filter.of_length(waveform.seconds, is_cut=is_longer)) is not None:
            return SkippedClip(reason, name, is_filtered=True)
        samples_S = waveform.samples_S.numpy()
        if len(samples_S) < self.frame_size:
            return SkippedClip("too short", f"'{name}' is {waveform.seconds:.3f} s long, less than a codec frame")
        return CodedClip(
            name,
            seconds=waveform.seconds,
            is_cut=waveform.is_cut,
            text=row.get("text"),
            speaker=row.get("speaker"),
            audio_warnings=waveform.audio_warnings,
            audio_hash=hashlib.blake2b(memoryview(samples_S), digest_size=HASH_BYTES).digest(),
            samples_S=samples_S,
        )


class TextCorpus(SourceReader):
    """Reader of documents (``column``): the lines of text files, or the rows of a data set in another format."""

    def __init__(self, name: str, column: str) -> None:
        super().__init__(open_source(name, None, "", column))

    def clips(self, row: Row) -> list[CodedClip | SkippedClip]:
        """Convert a row to a list of one document."""
        if (problem := row.get("problem")) is not None:
            return [SkippedClip("damaged row", f"'{row['name']}' cannot be used: {problem}")]
        if row["text"] is None:
            return [SkippedClip("no text", f"'{row['name']}' has no text", is_filtered=True)]
        return [CodedClip(row["name"], text=row["text"])]


def read_row(row: Row, sample_rate_hz: int | None, *, max_seconds: float) -> Waveform:
    """Read the audio of a row: a file, or a part of a recording. For arguments and errors, see `read_audio`.

    For a row with a duration of at most ``max_seconds``, ``is_cut`` is True if the audio is shorter than the duration.
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
            raise AudioError("missing", f"'{name}' cannot be opened ({error}); check the path") from error
    seconds, start = math.inf if duration is None else duration, row.get("offset") or 0.0
    limit = min(seconds, max_seconds)
    waveform = read_audio(audio, sample_rate_hz, start_seconds=start, max_seconds=limit, name=name)
    if seconds > max_seconds:
        return waveform
    is_short = waveform.seconds < seconds - ROUNDED_SECONDS
    warnings = waveform.audio_warnings + (SHORTER,) * is_short
    return dataclasses.replace(waveform, is_cut=is_short, audio_warnings=warnings)


class _WithErrors(IterableDataset):
    """Dataset that yields a `UserError` instead of raising it: PyTorch would add a traceback to an exception."""

    def __init__(self, read: Callable[[int, int], Iterable[Any]]) -> None:
        self._read = read

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        try:
            yield from self._read(info.id, info.num_workers) if info else self._read(0, 1)
        except UserError as error:
            yield UserError(str(error))


def read_in_workers(read: Callable[[int, int], Iterable[Any]], **workers: Any) -> Iterator[Any]:
    """Call ``read(worker, num_workers)`` in each worker process, and yield one item of each worker in turn.

    ``workers``: arguments of a `DataLoader`. If ``num_workers`` is 0, ``read(0, 1)`` is called in this process.
    """
    # PyTorch draws a seed for the workers; this draw must not change the random state of training.
    options: dict[str, Any] = {"batch_size": None, "collate_fn": _unchanged, "generator": torch.Generator(), **workers}
    try:
        loader = DataLoader(_WithErrors(read), worker_init_fn=partial(_end_with, os.getpid()), **options)
    except ValueError as error:
        raise UserError(f"the dataloader settings {workers} contradict each other; set num_workers to 1") from error
    for item in loader:
        if isinstance(item, UserError):
            raise item
        yield item


def _unchanged(item: Any) -> Any:
    return item


def _end_with(parent: int, worker: int) -> None:
    """End this worker when its parent process ends or is killed. Otherwise the worker would wait for ever."""
    end_with_parent()
    if os.getppid() != parent:  # the parent has already ended
        os._exit(1)


def is_too_many(num_skipped: int, num_read: int, max_skip_fraction: float, *, is_whole: bool, is_end: bool) -> bool:
    """Return True if more than the allowed fraction of the clips was skipped.

    The ``num_read`` clips are only a sample if more clips follow (``is_end`` is False) or if other ranks read other
    clips (``is_whole`` is False). For a sample, the allowed number of skipped clips is raised by three standard
    deviations plus one clip. If fewer than `MIN_JUDGED_CLIPS` clips were read, the check runs only at the end, with the
    number allowed for `MIN_JUDGED_CLIPS` clips. If ``max_skip_fraction`` is 0, the check runs after every clip.
    """
    allowed = max_skip_fraction * max(num_read, MIN_JUDGED_CLIPS)
    if not (is_end and is_whole) and max_skip_fraction:
        allowed += 3 * math.sqrt(allowed) + 1
    return (is_end or num_read >= MIN_JUDGED_CLIPS or not max_skip_fraction) and num_skipped > allowed
