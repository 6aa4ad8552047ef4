"""Read audio bytes or files of any format as mono float32 at the codec's rate, and write WAV files."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import soxr
import torch

from llama_mimi.audio.decoders import fault_at_end, opened
from llama_mimi.common.errors import UserError, first_line
from llama_mimi.common.files import write_atomically

# Samples beyond it are not audio in [-1, 1] but integers that were stored as floats. 16 is 24 dB over full scale: mixes
# and lossy codecs go over it by a few dB, and speech of 16-bit integers that stays below is quieter than -66 dB.
MAX_PEAK = 16.0
# Endings that are looked for in a folder; files given by name may have others.
AUDIO_ENDINGS = (".wav", ".flac", ".ogg", ".mp3")
# Sample rates of speech. Headers outside are damaged, and would stretch a clip or make endless work of it.
RATES_HZ = (1_000, 1_000_000)
# How `read_audio` resamples; codes depend on it.
RESAMPLER = "soxr HQ"
# Warnings on clips that are used all the same; each is counted.
OPPOSITE = "in opposite phases, the loudest channel taken"
SHORTER = "shorter than its manifest says"
# Where the mean of the channels would cancel more than this fraction of the energy, the loudest channel is used.
MAX_CANCELLED = 0.1
FAULTS = {
    "breaks off": "ends before the length in its header; copy it again",
    "chained Ogg": "is several Ogg files one after another; split it, or convert it to one WAV or FLAC file",
}


class AudioError(UserError):
    """A clip that cannot be used; skipped clips are counted by ``reason``, such as "unreadable" or "non-finite"."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        """Keep the reason when ranks exchange errors."""
        return type(self), (self.reason, str(self))


@dataclass(frozen=True)
class Waveform:
    """One clip in mono float32, with `OPPOSITE` or `SHORTER` where they apply."""

    samples_S: torch.Tensor
    sample_rate_hz: int
    is_cut: bool = False  # the source is longer than what was asked for
    audio_warnings: tuple[str, ...] = ()

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
    ("HQ", 20 bits). Only the first ``max_seconds`` are decoded, in blocks.

    Args:
        source: a path, or the bytes of a file.
        sample_rate_hz: None keeps the rate of the file.
        start_seconds: leave out what comes before; in WAV, AIFF and FLAC it is not decoded.
        name: the clip's name in messages; by default its path.
        min_samples: minimum length at ``sample_rate_hz``, such as a codec's frame.

    Raises:
        AudioError: missing, not audio, damaged, breaking off, a chained Ogg, empty, shorter than ``min_samples``, or
            with samples that are not finite or far outside [-1, 1].
    """
    name = name or ("audio bytes" if isinstance(source, bytes) else str(source))
    try:
        with _open(source, name) as stream:
            waveform = _read(stream, name, sample_rate_hz, start_seconds, max_seconds)
    except AudioError:
        raise
    except ImportError as error:
        raise AudioError(
            "needs FFmpeg",
            f"'{name}' is read by FFmpeg alone; install it with `uv sync --extra ffmpeg`, or convert the file to WAV, "
            "FLAC, MP3 or OGG",
        ) from error
    except Exception as error:  # decoders raise various errors for damaged files
        detail = first_line(error).split(": ", 1)[-1].rstrip(".")
        raise AudioError(
            "unreadable", f"'{name}' is not readable audio ({detail}); give a WAV, FLAC, MP3 or OGG file"
        ) from error
    if len(waveform.samples_S) < min_samples:
        raise AudioError(
            "too short",
            f"'{name}' is {1000 * waveform.seconds:.1f} ms long, less than one codec frame "
            f"({1000 * min_samples / waveform.sample_rate_hz:.0f} ms); give a longer clip",
        )
    return waveform


def write_wav(path: str | Path, waveform: Waveform) -> None:
    """Write a 16-bit PCM WAV file, clipped to [-1, 1], as a whole or not at all; create missing folders.

    Raises:
        UserError: the file system is full or refuses.
    """
    stream, path = BytesIO(), Path(path)
    samples_S = waveform.samples_S.clamp(-1, 1).numpy()
    soundfile.write(stream, samples_S, waveform.sample_rate_hz, format="WAV", subtype="PCM_16")
    write_atomically(str(path.parent), path.name, stream.getvalue())


@contextmanager
def wav_writer(path: str | Path, sample_rate_hz: int) -> Iterator[soundfile.SoundFile]:
    """Open a mono 16-bit PCM WAV file that can be played while it grows; create missing folders.

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


def _open(source: str | Path | bytes, name: str) -> BinaryIO:
    if not isinstance(source, bytes):
        path = Path(source)
        if not path.exists():
            raise AudioError("missing", f"'{name}' does not exist; check the path")
        if path.is_dir():
            raise AudioError("unreadable", f"'{name}' is a directory; name one audio file")
    if not (len(source) if isinstance(source, bytes) else path.stat().st_size):
        raise AudioError("empty", f"'{name}' is empty (0 bytes); give a WAV, FLAC, MP3 or OGG file")
    return BytesIO(source) if isinstance(source, bytes) else path.open("rb", buffering=0)


def _read(
    stream: BinaryIO,
    name: str,
    wanted_hz: int | None,
    start_seconds: float,
    max_seconds: float | None,
    channel: int | None = None,
) -> Waveform:
    """Read the mean of the channels, or ``channel``; read again where the channels cancel each other."""
    parts: list[np.ndarray] = []
    num_read, is_cut, cancelled = 0, False, 0.0
    with opened(stream, start_seconds) as (rate_hz, C, num_samples, blocks):
        if not RATES_HZ[0] <= rate_hz <= RATES_HZ[1]:
            raise AudioError(
                "sample rate", f"the sample rate of '{name}' is {rate_hz:,} Hz, not 1 kHz to 1 MHz; fix its header"
            )
        wanted_hz = wanted_hz or rate_hz
        resampler = soxr.ResampleStream(rate_hz, wanted_hz, 1) if wanted_hz != rate_hz else None
        limit = None if max_seconds is None else math.ceil(max_seconds * rate_hz)
        energy_C = np.zeros(C)
        for block_SC in blocks:
            if limit is not None and num_read + len(block_SC) > limit:
                is_cut, block_SC = True, block_SC[: limit - num_read]
            num_read += len(block_SC)
            _check_samples(block_SC, name)
            if C == 1:
                mono_S = block_SC[:, 0]
            elif channel is not None:
                mono_S = block_SC[:, channel].copy()  # frees the other channels
            else:
                mono_S = block_SC.mean(axis=1)
                of_block_C = np.square(block_SC, dtype=np.float64).sum(axis=0)
                energy_C += of_block_C
                # Channels that do not cancel leave at least a C-th of the loudest in the mean; a half of it is 6 dB.
                if np.square(mono_S, dtype=np.float64).sum() < 0.25 * of_block_C.max() / C**2:
                    cancelled += of_block_C.max()
            parts.append(resampler.resample_chunk(mono_S) if resampler else mono_S)
            if is_cut:
                break
        if resampler:
            parts.append(resampler.resample_chunk(np.empty(0, np.float32), last=True))
    if not is_cut and (fault := "breaks off" if num_read < (num_samples or 0) else fault_at_end(stream)):
        raise AudioError(fault, f"'{name}' {FAULTS[fault]}")
    if cancelled > MAX_CANCELLED * energy_C.max():
        return _read(stream, name, wanted_hz, start_seconds, max_seconds, int(energy_C.argmax()))
    samples_S = np.concatenate([*parts, np.empty(0, np.float32)])
    samples_S = samples_S if max_seconds is None else samples_S[: round(max_seconds * wanted_hz)]
    if not len(samples_S):
        if start_seconds:
            raise AudioError("past the end", f"'{name}' ends before its start of {start_seconds:g} s; fix the start")
        raise AudioError("empty", f"'{name}' has no audio samples; give a clip with sound in it")
    return Waveform(torch.from_numpy(samples_S), wanted_hz, is_cut, () if channel is None else (OPPOSITE,))


def _check_samples(block_SC: np.ndarray, name: str) -> None:
    peak = float(np.abs(block_SC).max(initial=0.0))
    if not math.isfinite(peak):
        raise AudioError("non-finite", f"'{name}' has NaN or infinite samples; repair or remove the file")
    if peak > MAX_PEAK:
        raise AudioError(
            "out of range",
            f"'{name}' has samples up to {peak:,.0f}, outside [-1, 1] (more than {MAX_PEAK:g} is not an overshoot): "
            "integers that were stored as floats? divide them by their full scale",
        )
