"""Audio bytes or files of any kind -> mono float32 at the codec's rate."""

import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import soxr
import torch

from llama_mimi.audio.decoders import NeedsFFmpeg, OggLink, Recording, breaks_off, ogg_links, opened
from llama_mimi.common.errors import UserError, first_line
from llama_mimi.common.files import write_atomically

# Samples beyond it are no audio in [-1, 1] but integers that were stored as floats. 16 is 24 dB over full scale: mixes
# and lossy codecs go over it by a few dB, and speech of 16-bit integers that stays below is quieter than -66 dB.
MAX_PEAK = 16.0
# Of the files that are looked for in a folder; by name others are read as well.
AUDIO_ENDINGS = (".wav", ".flac", ".ogg", ".mp3")
# What speech may be recorded at. Headers outside are damaged, and would stretch a clip or make endless work of it.
RATES_HZ = (1_000, 1_000_000)
# How `read_audio` resamples; codes depend on it.
RESAMPLER = "soxr HQ"
# What was done to make a clip usable; each is counted.
DAMAGED = "damaged, read as far as it goes"
OPPOSITE = "in opposite phases, the loudest channel taken"
SHORTER = "shorter than its manifest says"
# Where the mean of the channels would cancel more than this share of the energy, the loudest channel is used.
MAX_CANCELLED = 0.1


class AudioError(UserError):
    """A clip that cannot be used.

    Args:
        reason: a short category that skipped clips are counted under ("unreadable", "empty", "non-finite", ...).
        message: one sentence that names the clip.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        """Also between ranks."""
        return type(self), (self.reason, str(self))


# Errors that do not mean that the file is damaged: we refused the clip, or memory or the disk failed.
NOT_OF_THE_FILE = (AudioError, MemoryError, OSError)


@dataclass(frozen=True)
class Waveform:
    """One clip.

    Args:
        samples_S: mono float32 (S,).
        sample_rate_hz: of ``samples_S``.
        is_cut: the source went on after ``max_seconds``, or broke off.
        remarks: `DAMAGED`, `OPPOSITE` and `SHORTER`, where they apply.
    """

    samples_S: torch.Tensor
    sample_rate_hz: int
    is_cut: bool = False
    remarks: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        return len(self.samples_S) / self.sample_rate_hz


def read_audio(
    source: str | Path | bytes,
    sample_rate_hz: int | None,
    *,
    start_seconds: float = 0.0,
    max_seconds: float | None = None,
    name: str | None = None,
    min_samples: int = 1,
) -> Waveform:
    """Read WAV, FLAC, MP3, OGG (whatever libsndfile reads), with PyAV also M4A, AAC, WebM and WMA, as mono float32.

    Channels are averaged, but where they cancel each other the loudest is taken. Other rates are resampled by soxr
    ("HQ", 20 bits). Only the first ``max_seconds`` are decoded, in blocks, so that a two-hour file costs no more than a
    short one, in memory, too.

    Args:
        source: a path, or the bytes of a file.
        sample_rate_hz: the rate wanted, usually the codec's; None keeps that of the file.
        start_seconds: leave out what comes before; in WAV, AIFF and FLAC it is not decoded.
        max_seconds: cut longer audio here and say so in ``is_cut``; None reads everything.
        name: what to call the clip in messages; by default its path.
        min_samples: the fewest samples at ``sample_rate_hz`` that make a clip; a codec's frame.

    Raises:
        AudioError: missing, not audio, empty, shorter than ``min_samples``, with NaN or infinite samples, or with
            samples that are not in [-1, 1] by far.
    """
    name = name or ("audio bytes" if isinstance(source, bytes) else str(source))
    try:
        if isinstance(source, bytes):
            if not source:
                raise AudioError("empty", f"'{name}' is empty (0 bytes); give a WAV, FLAC, MP3 or OGG file")
            waveform = _read_part(BytesIO(source), name, sample_rate_hz, start_seconds, max_seconds)
        else:
            with _existing_file(Path(source), name).open("rb", buffering=0) as file:
                waveform = _read_part(file, name, sample_rate_hz, start_seconds, max_seconds)
    except AudioError:
        raise
    except NeedsFFmpeg as error:
        raise AudioError(
            "needs FFmpeg",
            f"'{name}' is {error}, which FFmpeg reads; install it with `uv sync --extra ffmpeg`, or convert the "
            "file to WAV, FLAC, MP3 or OGG",
        ) from error
    except Exception as error:  # decoders raise whatever a damaged file makes of them
        raise _unreadable(name, error) from error
    if len(waveform.samples_S) < min_samples:
        rate_hz = waveform.sample_rate_hz
        raise AudioError(
            "too short",
            f"'{name}' is {1000 * waveform.seconds:.1f} ms long, less than one codec frame "
            f"({1000 * min_samples / rate_hz:.0f} ms); give a longer clip",
        )
    return waveform


def resample(samples_S: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
    """Mono samples (S,) in float32 at another rate, as `read_audio` resamples."""
    return soxr.resample(samples_S, from_hz, to_hz)


def write_wav(path: str | Path, waveform: Waveform) -> None:
    """Write 16-bit PCM WAV, clipped to [-1, 1], as a whole or not at all; missing folders are created.

    Raises:
        UserError: the file system is full or refuses.
    """
    stream, path = BytesIO(), Path(path)
    samples_S = waveform.samples_S.clamp(-1, 1).numpy()
    soundfile.write(stream, samples_S, waveform.sample_rate_hz, format="WAV", subtype="PCM_16")
    write_atomically(str(path.parent), path.name, stream.getvalue())


@contextmanager
def wav_writer(path: str | Path, sample_rate_hz: int) -> Iterator[soundfile.SoundFile]:
    """A 16-bit PCM WAV file of one channel that can be played while it grows; folders on the way are made.

    Raises:
        UserError: the file system is full or refuses. The incomplete file is removed.
    """
    path = Path(path)
    is_ours = not path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        name = os.fsencode(path)  # soundfile encodes a str as strict UTF-8
        with soundfile.SoundFile(name, "w", sample_rate_hz, 1, format="WAV", subtype="PCM_16") as file:
            is_ours = True
            yield file
    except (OSError, soundfile.LibsndfileError) as error:
        if is_ours and path.is_file():
            path.unlink()
        raise UserError(
            f"'{path}' could not be written ({first_line(error)}); free disk space, or choose another folder"
        ) from error


def _existing_file(path: Path, name: str) -> Path:
    try:
        found = path.stat()
    except FileNotFoundError as error:
        raise AudioError("missing", f"'{name}' does not exist; check the path") from error
    if stat.S_ISDIR(found.st_mode):
        raise AudioError("unreadable", f"'{name}' is a directory; name one audio file")
    if found.st_size == 0:
        raise AudioError("empty", f"'{name}' is empty (0 bytes); give a WAV, FLAC, MP3 or OGG file")
    return path


def _read_part(
    stream: BinaryIO, name: str, wanted_hz: int | None, start_seconds: float, max_seconds: float | None
) -> Waveform:
    """What comes after the start. A chain of Ogg files is decoded from its beginning, to know how long they are."""
    if not start_seconds:
        return _read(stream, name, wanted_hz, max_seconds)
    try:
        if len(list(islice(ogg_links(stream), 2))) < 2:
            return _read(stream, name, wanted_hz, max_seconds, start_seconds)
        end = None if max_seconds is None else start_seconds + max_seconds
        whole = _read(stream, name, wanted_hz, end)
        part = replace(whole, samples_S=whole.samples_S[round(start_seconds * whole.sample_rate_hz) :].clone())
    except AudioError as error:
        if error.reason != "empty":
            raise
        part = None
    if part is None or not len(part.samples_S):
        raise AudioError("past the end", f"'{name}' ends before {start_seconds:g} s, where it is to begin; mend that")
    return part


def _read(
    stream: BinaryIO, name: str, wanted_hz: int | None, max_seconds: float | None, start_seconds: float = 0.0
) -> Waveform:
    """All recordings of a file, one behind the other; the start is in the first."""
    parts = [_read_recording(stream, None, name, wanted_hz, max_seconds, start_seconds)]
    rate_hz = parts[0].sample_rate_hz
    is_damaged = not parts[0].is_cut and breaks_off(stream)
    for number, link in enumerate(() if parts[0].is_cut else ogg_links(stream)):
        if number:
            left = None if max_seconds is None else max_seconds - sum(part.seconds for part in parts)
            try:
                parts.append(_read_recording(stream, link, name, rate_hz, left))
            except NOT_OF_THE_FILE:
                raise
            except Exception:  # decoders raise whatever a damaged file makes of them; what came before is sound
                is_damaged = True
        is_damaged |= not link.is_whole
        if is_damaged or parts[-1].is_cut:
            break
    # In NumPy: a process that was forked from one in which PyTorch has used its threads waits for them for ever.
    samples_S = torch.from_numpy(np.concatenate([part.samples_S.numpy() for part in parts]))
    if max_seconds is not None:
        samples_S = samples_S[: round(max_seconds * rate_hz)]
    if len(samples_S) == 0:
        raise AudioError("empty", f"'{name}' holds no audio samples; give a clip with sound in it")
    remarks = [remark for part in parts for remark in part.remarks] + [DAMAGED] * is_damaged
    return Waveform(samples_S, rate_hz, is_damaged or parts[-1].is_cut, tuple(dict.fromkeys(remarks)))


def _read_recording(
    stream: BinaryIO,
    link: OggLink | None,
    name: str,
    wanted_hz: int | None,
    max_seconds: float | None,
    start_seconds: float = 0.0,
) -> Waveform:
    """One recording; read a second time where its channels cancel each other."""
    with opened(stream, link, start_seconds) as recording:
        waveform, loudest = _mono(recording, name, wanted_hz, max_seconds, None)
    if loudest is None:
        return waveform
    with opened(stream, link, start_seconds) as recording:
        waveform, _ = _mono(recording, name, wanted_hz, max_seconds, loudest)
    return replace(waveform, remarks=(*waveform.remarks, OPPOSITE))


def _mono(
    recording: Recording, name: str, wanted_hz: int | None, max_seconds: float | None, channel: int | None
) -> tuple[Waveform, int | None]:
    """A recording as mono at the rate wanted, and the channel to take if the mean of all is not to be used.

    Args:
        channel: the one to take; None takes the mean.
    """
    rate_hz, C = recording.rate_hz, recording.num_channels
    if not RATES_HZ[0] <= rate_hz <= RATES_HZ[1]:
        raise AudioError(
            "sample rate", f"'{name}' says that its sample rate is {rate_hz:,} Hz, at which nobody records; mend it"
        )
    wanted_hz = wanted_hz or rate_hz
    resampled = soxr.ResampleStream(rate_hz, wanted_hz, 1) if wanted_hz != rate_hz else None
    limit = None if max_seconds is None else math.ceil(max_seconds * rate_hz)
    parts: list[np.ndarray] = []
    num_read, is_cut, is_damaged = 0, False, False
    energy_C, cancelled = np.zeros(C), 0.0
    try:
        for block_SC in recording.blocks:
            if limit is not None and num_read + len(block_SC) > limit:
                is_cut, block_SC = True, block_SC[: limit - num_read]
            num_read += len(block_SC)
            _check_samples(block_SC, name)
            if C == 1:
                mono_S = block_SC[:, 0]
            elif channel is None:
                mono_S = block_SC.mean(axis=1)
                of_block_C = np.square(block_SC, dtype=np.float64).sum(axis=0)
                energy_C += of_block_C
                cancelled += _cancelled(mono_S, of_block_C)
            else:
                mono_S = block_SC[:, channel].copy()  # and let the others go
            parts.append(resampled.resample_chunk(mono_S) if resampled else mono_S)
            if is_cut:
                break
        is_damaged = not is_cut and num_read < (recording.num_samples or 0)
    except NOT_OF_THE_FILE:
        raise
    except Exception:  # decoders raise whatever a damaged file makes of them; what came before is sound
        if num_read == 0:
            raise
        is_damaged = True
    if resampled:
        parts.append(resampled.resample_chunk(np.empty(0, np.float32), last=True))
    samples_S = np.concatenate(parts) if parts else np.empty(0, np.float32)
    waveform = Waveform(torch.from_numpy(samples_S), wanted_hz, is_cut or is_damaged, (DAMAGED,) * is_damaged)
    is_opposite = cancelled > MAX_CANCELLED * energy_C.max()
    return waveform, int(energy_C.argmax()) if is_opposite else None


def _cancelled(mono_S: np.ndarray, energy_C: np.ndarray) -> float:
    """The energy of the loudest channel of a block if the channels cancel each other in it, else 0.

    Channels that do not cancel leave at least what the loudest alone would leave of a mean, a C-th of it; half of that
    (6 dB less) is taken as cancelled.
    """
    left = float(np.square(mono_S, dtype=np.float64).sum())
    return float(energy_C.max()) if left < 0.25 * energy_C.max() / len(energy_C) ** 2 else 0.0


def _check_samples(block_SC: np.ndarray, name: str) -> None:
    if not block_SC.size:
        return
    peak = float(np.abs(block_SC).max())
    if not math.isfinite(peak):
        raise AudioError("non-finite", f"'{name}' holds NaN or infinite samples; repair or remove the file")
    if peak > MAX_PEAK:
        raise AudioError(
            "out of range",
            f"'{name}' has samples up to {peak:,.0f}, which are not in [-1, 1] (more than {MAX_PEAK:g} is no "
            "overshoot): integers that were stored as floats? divide them by their full scale",
        )


def _unreadable(name: str, error: Exception) -> AudioError:
    detail = first_line(error).split(": ", 1)[-1].rstrip(".")
    return AudioError("unreadable", f"'{name}' is no readable audio ({detail}); give a WAV, FLAC, MP3 or OGG file")
