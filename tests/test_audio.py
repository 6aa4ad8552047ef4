"""Any audio -> mono float32 at one rate; each bad input as a row with its reason and sentence."""

import io

import numpy as np
import pytest
import soundfile
import torch

from llama_mimi.audio.reading import AudioError, read_audio

RATE = 24_000


def tone(rate_hz: int, seconds: float = 1.0, channels: int = 1) -> np.ndarray:
    """A 440 Hz tone of amplitude 0.5, (S, channels)."""
    samples = 0.5 * np.sin(2 * np.pi * 440 * np.arange(int(rate_hz * seconds)) / rate_hz)
    return np.repeat(samples[:, None], channels, axis=1).astype(np.float32)


def encoded(rate_hz: int, channels: int, **form) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(rate_hz, channels=channels), rate_hz, **form)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("rate_hz", "channels", "form", "tolerance"),
    [
        (24_000, 1, {"format": "WAV", "subtype": "PCM_16"}, 1e-4),
        (24_000, 1, {"format": "WAV", "subtype": "PCM_24"}, 1e-6),
        (24_000, 1, {"format": "WAV", "subtype": "FLOAT"}, 0),
        (8_000, 1, {"format": "WAV", "subtype": "PCM_16"}, 0.01),
        (44_100, 2, {"format": "FLAC"}, 0.01),
        (192_000, 1, {"format": "WAV", "subtype": "PCM_24"}, 0.01),
        (44_100, 2, {"format": "MP3"}, 0.05),
        (48_000, 1, {"format": "OGG", "subtype": "OPUS"}, 0.05),
        (16_000, 1, {"format": "OGG", "subtype": "VORBIS"}, 0.05),
    ],
    ids=lambda value: None if not isinstance(value, dict) else "-".join(value.values()),
)
def test_every_format_gives_the_same_tone(rate_hz, channels, form, tolerance, tmp_path):
    content = encoded(rate_hz, channels, **form)
    path = tmp_path / "clip"
    path.write_bytes(content)
    waveform = read_audio(path, RATE)
    assert waveform.samples_S.dtype == torch.float32 and waveform.samples_S.ndim == 1
    assert torch.equal(waveform.samples_S, read_audio(content, RATE).samples_S)
    assert waveform.seconds == pytest.approx(1.0, abs=0.06)  # MP3 pads
    # compare in the middle, away from the codecs' edges; the delay of MP3 shows as phase, so compare spectra
    spectrum = torch.fft.rfft(waveform.samples_S[6000:18000]).abs() / 6000
    expected = torch.fft.rfft(torch.from_numpy(tone(RATE)[6000:18000, 0])).abs() / 6000
    assert float((spectrum - expected).abs().max()) <= max(tolerance, 1e-6)


def test_stereo_is_averaged():
    samples = np.stack([np.full(RATE, 0.5), np.full(RATE, -0.25)], axis=1).astype(np.float32)
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, RATE, format="WAV", subtype="FLOAT")
    assert torch.equal(read_audio(buffer.getvalue(), RATE).samples_S, torch.full((RATE,), 0.125))


def test_cut_reads_only_what_is_needed(tmp_path):
    path = tmp_path / "two_hours.wav"
    with soundfile.SoundFile(path, "w", 8_000, 1, subtype="PCM_U8", format="WAV") as file:
        for _ in range(120):
            file.write(np.zeros(8_000 * 60, dtype=np.float32))
    waveform = read_audio(path, RATE, max_seconds=20)
    assert waveform.is_cut and len(waveform.samples_S) == 20 * RATE


@pytest.mark.parametrize("max_seconds", [0.9999, 1.0, 1.5])
def test_is_cut_says_whether_the_source_went_on(max_seconds):
    waveform = read_audio(encoded(44_100, 2, format="FLAC"), RATE, max_seconds=max_seconds)
    assert waveform.is_cut == (max_seconds < 1.0)


def wav(samples: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, RATE, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "reason", "message"),
    [
        (b"", "empty", "0 bytes"),
        (b"this is a text, not a recording\n" * 20, "unreadable", "not readable audio"),
        (wav(np.zeros(0, np.float32)), "empty", "no audio samples"),
        (wav(np.zeros(1919, np.float32)), "too short", "less than one codec frame"),
        (wav(np.full(4000, np.nan, np.float32)), "non-finite", "NaN or infinite"),
        (wav(np.full(4000, np.inf, np.float32)), "non-finite", "NaN or infinite"),
        (encoded(RATE, 1, format="WAV")[:40], "unreadable", "not readable audio"),
    ],
    ids=["empty", "text", "no samples", "short", "nan", "infinite", "truncated"],
)
def test_bad_audio_is_named(content, reason, message, tmp_path):
    path = tmp_path / "clip.wav"
    path.write_bytes(content)
    for source in (path, content):
        with pytest.raises(AudioError, match=message) as error:
            read_audio(source, RATE, min_samples=1920, name="clip.wav")
        assert error.value.reason == reason and "'clip.wav'" in str(error.value)
        assert "\n" not in str(error.value)


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(AudioError, match="does not exist"):
        read_audio(tmp_path / "nothing.wav", RATE)
    with pytest.raises(AudioError, match="is a directory"):
        read_audio(tmp_path, RATE)
