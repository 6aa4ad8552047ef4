"""From a row of a corpus to a clip: as audio, whole, in parts or split at pauses, or as codes."""

import dataclasses
import hashlib
import itertools
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch

from llama_mimi.audio.reading import SHORTER, AudioError, Waveform, read_audio
from llama_mimi.audio.silence import split_at_pauses
from llama_mimi.common.errors import first_line
from llama_mimi.data.code_store import CodeCorpus, CodedClip, CodeGroup
from llama_mimi.data.corpora import AudioCorpus
from llama_mimi.data.order import ClipRef
from llama_mimi.data.row_filter import RowFilter

# Of a long recording that is split: 345 MB at 24 kHz.
SECONDS_AT_ONCE = 3600.0
ROUNDED_SECONDS = 0.1  # that manifests may be wrong by
HASH_BYTES = 16


@dataclass(frozen=True)
class SkippedClip:
    """A row that is not used, with a short category and a sentence that names it."""

    reason: str
    message: str
    is_filtered: bool = False  # it could be used, but was not wanted


@dataclass(frozen=True)
class AudioClip:
    """One usable row of audio; ``audio_warnings`` as `llama_mimi.audio.reading.Waveform`."""

    name: str  # id or path
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


Clip = AudioClip | CodedClip | SkippedClip


class AudioReader:
    """Reader of rows of audio as waveforms.

    Args:
        sample_rate_hz, frame_size: of the codec; clips shorter than a frame are skipped.
        max_frames: longer clips are cut.
        with_text: skip rows without a transcript.
        splits: split longer recordings at pauses into several clips without texts.
        hashes: add a hash of its samples to each clip.
    """

    def __init__(
        self,
        corpus: AudioCorpus,
        *,
        sample_rate_hz: int,
        frame_size: int,
        max_frames: int,
        with_text: bool = False,
        row_filter: RowFilter | None = None,
        splits: bool = False,
        hashes: bool = False,
    ) -> None:
        self.corpus, self._filter, self._splits, self._hashes = corpus, row_filter or RowFilter(), splits, hashes
        self._sample_rate_hz, self._frame_size, self._with_text = sample_rate_hz, frame_size, with_text
        self._max_seconds = max_frames * frame_size / sample_rate_hz

    def clips(self, table: pa.Table, ref: ClipRef) -> list[Clip]:
        """One row of the row group ``table``; whatever is wrong with it, it is skipped with a reason."""
        name = self.corpus.row_name(ref.group, ref.row)
        try:
            values = {role: table[role][ref.row].as_py() for role in table.column_names}
            name = _label(values.get("id")) or _label((values["audio"] or {}).get("path")) or name
            if (reason := self._filter.of_values(values)) is not None:
                return [_filtered(name, reason)]
            if self._with_text and not values["text"] and not values.get("problem"):
                raise AudioError("no text", f"'{name}' has no text")
            if self._splits:
                return self._split(name, values, ref)
            waveform = self._read(name, values, ref, self._max_seconds)
            return [self._kept(name, waveform, _transcript(name, values.get("text")), values)]
        except AudioError as error:
            return [SkippedClip(error.reason, str(error))]
        except Exception as error:  # one odd row in a million must not end the run, whatever is odd about it
            what = f"{type(error).__name__}: {first_line(error)[:200]}"
            return [SkippedClip("unexpected", f"'{name}' cannot be read ({what})")]

    def _split(self, name: str, values: dict[str, Any], ref: ClipRef) -> list[Clip]:
        """An hour at a time, so that memory has a limit."""
        found: list[Waveform] = []
        begin, rate_hz = values.get("offset") or 0.0, self._sample_rate_hz
        left = values.get("duration")
        at_once = max(SECONDS_AT_ONCE, 2 * self._max_seconds)
        goes_on = True
        while goes_on:
            waveform = self._read(name, values | {"offset": begin, "duration": left}, ref, at_once)
            goes_on = waveform.is_cut
            ends = split_at_pauses(waveform.samples_S, rate_hz, self._max_seconds)
            ends = ends[:-1] if goes_on else ends  # where it goes on, the last has no pause at its end
            for start, end in itertools.pairwise([0, *ends]):
                part = dataclasses.replace(waveform, samples_S=waveform.samples_S[start:end].clone())
                if goes_on or end != ends[-1]:
                    part = dataclasses.replace(
                        part, is_cut=True, audio_warnings=tuple({*part.audio_warnings} - {SHORTER})
                    )
                found.append(part)
            begin += ends[-1] / rate_hz
            left = None if left is None else left - ends[-1] / rate_hz
        if len(found) == 1:
            return [self._kept(name, found[0], _transcript(name, values.get("text")), values)]
        return [self._kept(f"{name}_{number:05d}", part, None, values) for number, part in enumerate(found)]

    def _read(self, name: str, values: dict[str, Any], ref: ClipRef, max_seconds: float) -> Waveform:
        return read_row(self.corpus, ref.group, values, name, self._sample_rate_hz, max_seconds=max_seconds)

    def _kept(self, name: str, waveform: Waveform, text: str | None, values: dict[str, Any]) -> Clip:
        if (reason := self._filter.of_length(waveform.seconds, is_cut=waveform.is_cut)) is not None:
            return _filtered(name, reason)
        if len(waveform.samples_S) < self._frame_size:
            return SkippedClip("too short", f"'{name}' is {waveform.seconds:.3f} s, less than a frame of the codec")
        speaker, audio_hash = _label(values.get("speaker")), None
        if self._hashes:
            audio_hash = hashlib.blake2b(memoryview(waveform.samples_S.numpy()), digest_size=HASH_BYTES).digest()
        return AudioClip(name, waveform.samples_S, waveform.is_cut, text, speaker, waveform.audio_warnings, audio_hash)


def _filtered(name: str, reason: str) -> SkippedClip:
    return SkippedClip(reason, f"'{name}' was left out: {reason}", is_filtered=True)


def read_row(
    corpus: AudioCorpus,
    group: int,
    values: Mapping[str, Any],
    name: str,
    sample_rate_hz: int | None,
    *,
    max_seconds: float,
) -> Waveform:
    """Read the audio of a row, or the part of a recording; arguments as `llama_mimi.audio.reading.read_audio`.

    A part that ends with its row is not cut, although the recording goes on.

    Raises:
        AudioError: it cannot be used.
    """
    if values.get("problem"):
        raise AudioError("damaged row", f"'{name}' cannot be used: {values['problem']}")
    duration: float = values.get("duration") or math.inf
    is_part = duration <= max_seconds
    waveform = read_audio(
        _source(corpus, group, values["audio"] or {}, name),
        sample_rate_hz,
        start_seconds=values.get("offset") or 0.0,
        max_seconds=duration if is_part else max_seconds,
        name=name,
    )
    if not is_part:
        return waveform
    is_short = waveform.seconds < duration - ROUNDED_SECONDS
    return dataclasses.replace(waveform, is_cut=False, audio_warnings=waveform.audio_warnings + (SHORTER,) * is_short)


def _source(corpus: AudioCorpus, group: int, audio: Mapping[str, Any], name: str) -> bytes | str:
    content, path = audio.get("bytes"), audio.get("path") or None
    if content is None and path is None:
        raise AudioError("no audio", f"'{name}' has neither audio bytes nor a path")
    content = b"" if content is None else content
    if not isinstance(content, bytes):
        raise AudioError(
            "not bytes",
            f"'{name}' holds its audio as {type(content).__name__}, not as bytes; write the bytes of its file",
        )
    if content or path is None:
        return content
    try:
        source = corpus.open_path(path, group)
    except OSError as error:
        raise AudioError("missing", f"'{name}' cannot be opened ({error}); check its path") from error
    is_there = isinstance(source, bytes) or os.path.exists(source)
    return source if is_there or audio["bytes"] is None else content


class CodeReader:
    """Reader of rows of a tokenised corpus; longer clips are cut, and rows without a wanted transcript skipped."""

    def __init__(self, corpus: CodeCorpus, *, max_frames: int, with_text: bool) -> None:
        self.corpus = corpus
        self._max_frames, self._with_text = max_frames, with_text

    def clips(self, group: CodeGroup, ref: ClipRef) -> list[Clip]:
        """One row of a row group."""
        name = group.columns["id"][ref.row]
        text = group.columns["text"][ref.row] if self._with_text else None
        if self._with_text and not text:
            return [SkippedClip("no text", f"'{name}' has no text")]
        codes_TQ = group.codes(ref.row)
        is_cut = group.columns["is_cut"][ref.row] or len(codes_TQ) > self._max_frames
        return [CodedClip(name, codes_TQ[: self._max_frames].copy(), 0.0, is_cut, text)]


ClipReader = AudioReader | CodeReader


def _transcript(name: str, value: Any) -> str | None:
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError as error:
        raise AudioError("text is no UTF-8", f"the text of '{name}' is no UTF-8 ({error})") from error


def _label(value: Any) -> str | None:
    """An id or a speaker: text, bytes of it, or a number."""
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    return None if value is None else str(value)
