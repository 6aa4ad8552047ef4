"""Audio bytes or files of any kind -> mono float32 at the codec's rate."""

import io
from dataclasses import dataclass
from pathlib import Path

import soundfile
import torch
import torchaudio.functional

from llama_mimi.errors import UserError


class AudioError(UserError):
    """A clip that cannot be used.

    Args:
        reason: a short category that skipped clips are counted under ("unreadable", "empty", "non-finite", ...).
        message: one sentence that names the clip.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Waveform:
    """One clip.

    Args:
        samples_S: mono float32 (S,).
        sample_rate_hz: of ``samples_S``.
        is_cut: the source went on after ``max_seconds``.
    """

    samples_S: torch.Tensor
    sample_rate_hz: int
    is_cut: bool = False

    @property
    def seconds(self) -> float:
        return len(self.samples_S) / self.sample_rate_hz


def read_audio(
    source: str | Path | bytes,
    sample_rate_hz: int,
    *,
    max_seconds: float | None = None,
    name: str | None = None,
    min_samples: int = 1,
) -> Waveform:
    """Read WAV, FLAC, MP3 or OGG (whatever libsndfile reads) as mono float32 at ``sample_rate_hz``.

    Channels are averaged and other rates resampled. Only the first ``max_seconds`` are decoded, so that a
    two-hour file costs no more than a short one.

    Args:
        source: a path, or the bytes of a file.
        sample_rate_hz: the rate wanted, usually the codec's.
        max_seconds: cut longer audio here and say so in ``is_cut``; None reads everything.
        name: what to call the clip in messages; by default its path.
        min_samples: the fewest samples at ``sample_rate_hz`` that make a clip; a codec's frame.

    Raises:
        AudioError: missing, not audio, empty, shorter than ``min_samples``, or with NaN or infinite samples.
    """
    if isinstance(source, bytes):
        name = name or "audio bytes"
        stream: io.BytesIO | str = io.BytesIO(source)
        if not source:
            raise AudioError("empty", f"'{name}' is empty (0 bytes); give a WAV, FLAC, MP3 or OGG file")
    else:
        name = name or str(source)
        stream = str(_existing_file(Path(source), name))
    samples_CS, source_rate_hz, is_cut = _decode(stream, name, max_seconds)
    if samples_CS.shape[1] == 0:
        raise AudioError("empty", f"'{name}' holds no audio samples; give a clip with sound in it")
    if not bool(torch.isfinite(samples_CS).all()):
        raise AudioError("non-finite", f"'{name}' holds NaN or infinite samples; repair or remove the file")
    samples_S = samples_CS.mean(dim=0)
    if source_rate_hz != sample_rate_hz:
        samples_S = torchaudio.functional.resample(samples_S, source_rate_hz, sample_rate_hz)
    if max_seconds is not None:
        samples_S = samples_S[: round(max_seconds * sample_rate_hz)]
    if len(samples_S) < min_samples:
        raise AudioError(
            "too short",
            f"'{name}' is {1000 * len(samples_S) / sample_rate_hz:.1f} ms long, less than one codec frame "
            f"({1000 * min_samples / sample_rate_hz:.0f} ms); give a longer clip",
        )
    return Waveform(samples_S.contiguous(), sample_rate_hz, is_cut)


def audio_seconds(path: str | Path) -> float:
    """Duration of a file from its header alone, in seconds.

    Raises:
        AudioError: missing or not audio.
    """
    path = _existing_file(Path(path), str(path))
    try:
        info = soundfile.info(str(path))
    except soundfile.SoundFileError as error:
        raise _unreadable(str(path), error) from error
    return info.frames / info.samplerate


def write_wav(path: str | Path, waveform: Waveform) -> None:
    """Write 16-bit PCM WAV, clipped to [-1, 1]; folders on the way are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(
        path, waveform.samples_S.clamp(-1, 1).numpy(), waveform.sample_rate_hz, format="WAV", subtype="PCM_16"
    )


def _existing_file(path: Path, name: str) -> Path:
    if path.is_dir():
        raise AudioError("unreadable", f"'{name}' is a directory; name one audio file")
    if not path.exists():
        raise AudioError("missing", f"'{name}' does not exist; check the path")
    if path.stat().st_size == 0:
        raise AudioError("empty", f"'{name}' is empty (0 bytes); give a WAV, FLAC, MP3 or OGG file")
    return path


def _decode(stream: io.BytesIO | str, name: str, max_seconds: float | None) -> tuple[torch.Tensor, int, bool]:
    """Samples (channels, S) at the source's rate, that rate, and whether the source went on."""
    try:
        with soundfile.SoundFile(stream) as file:
            frames = -1 if max_seconds is None else _ceil(max_seconds * file.samplerate)
            samples_SC = file.read(frames, dtype="float32", always_2d=True)
            is_cut = frames >= 0 and len(file.read(1)) > 0
            return torch.from_numpy(samples_SC.T), file.samplerate, is_cut
    except soundfile.SoundFileError as error:
        raise _unreadable(name, error) from error


def _ceil(value: float) -> int:
    return -int(-value // 1)


def _unreadable(name: str, error: Exception) -> AudioError:
    detail = str(error).split(": ", 1)[-1].rstrip(".")
    return AudioError("unreadable", f"'{name}' is no readable audio ({detail}); give a WAV, FLAC, MP3 or OGG file")
