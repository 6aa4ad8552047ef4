"""Reading audio: formats, channels, resampling, and a reason for each file that cannot be used."""

import io
import struct
import sys

import av
import fuzz_audio
import numpy as np
import pytest
import scipy.signal
import soundfile
import torch
from conftest import TINY
from soxr import resample

from llama_mimi.audio.reading import MAX_PEAK, OPPOSITE, AudioError, read_audio

RATE = 24_000
SPEECH = soundfile.read(TINY / "prompt.wav", dtype="float32")[0][: RATE * 3 // 2]  # 1.5 s


def written(samples=SPEECH, rate_hz=RATE, **form) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate_hz, **form)
    return stream.getvalue()


def wav(samples, rate_hz=RATE, subtype="FLOAT") -> bytes:
    return written(samples, rate_hz, format="WAV", subtype=subtype)


def with_rate(content: bytes, rate_hz: int) -> bytes:
    """Change the sample rate in the header (bytes 24 to 27) of a WAV file."""
    return content[:24] + struct.pack("<I", rate_hz) + content[28:]


def flac_of_length(num_samples: int) -> bytes:
    """Write a FLAC file with the given length in the header: the last 36 bits before the MD5 sum (RFC 9639, 8.2)."""
    content = bytearray(written(format="FLAC"))
    field = int.from_bytes(content[18:26], "big") >> 36 << 36 | num_samples
    content[18:26] = field.to_bytes(8, "big")
    return bytes(content)


def with_size(content: bytes, num_bytes: int) -> bytes:
    """Change the size of the samples, in bytes, that a WAV header states."""
    at = content.index(b"data") + 4
    return content[:at] + struct.pack("<I", num_bytes) + content[at + 4 :]


def with_damage(content: bytes) -> bytes:
    """Replace a tenth of the bytes, beginning in the middle, by noise."""
    middle, rng = len(content) // 2, np.random.default_rng(0)
    return content[:middle] + rng.bytes(len(content) // 10) + content[middle + len(content) // 10 :]


def by_ffmpeg(form: str, codec: str, rate_hz: int = RATE) -> bytes:
    return fuzz_audio.written_by_ffmpeg(SPEECH[:, None], form, codec, rate_hz)


def mp3(*, has_xing: bool, **options: str) -> bytes:
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp3", options={"write_xing": str(int(has_xing))}) as container:
        audio = container.add_stream("libmp3lame", rate=RATE, layout="mono", options=options)
        samples = np.concatenate([0.01 * SPEECH] * 4 + [SPEECH] * 4)  # parts with different bit rates
        frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        frame.sample_rate = RATE
        for packet in [*audio.encode(frame), *audio.encode(None)]:
            container.mux(packet)
    return stream.getvalue()


FLAC = written(format="FLAC")
OPUS = written(format="OGG", subtype="OPUS")
PAGES = written(np.tile(SPEECH, 8), format="OGG", subtype="VORBIS").split(b"OggS")
QUIET = np.zeros(RATE, np.float32)
# Name -> file, its length in seconds, and warnings.
READ = {
    "flac through a pipe": (flac_of_length(0), 1.5, ()),
    "flac before an ID3 tag": (FLAC + b"TAG" + bytes(125), 1.5, ()),
    "mp3": (mp3(has_xing=True, b="64k"), 12.0, ()),
    "mp3 of varying rate without Xing frame": (mp3(has_xing=False, q="2"), 12.0, ()),
    "wav of unknown size": (with_size(wav(SPEECH), 0xFFFFFFFF), 1.5, ()),
    "wav that counts its header": (with_size(wav(SPEECH), 4 * len(SPEECH) + 44), 1.5, ()),
    "opposite phases at first": (
        wav(np.stack([np.tile(SPEECH, 4), np.concatenate([-SPEECH, -SPEECH, SPEECH, SPEECH])], 1)),
        6.0,
        (OPPOSITE,),
    ),
    "opus behind noise": (OPUS + bytes(100), 1.5, ()),
    "192,001 Hz": (wav(resample(SPEECH, RATE, 192_001), 192_001), 1.5, ()),
    "opposite phases": (wav(np.stack([SPEECH, -SPEECH], 1)), 1.5, (OPPOSITE,)),
    "one of two channels": (wav(np.stack([SPEECH, 0 * SPEECH], 1)), 1.5, ()),
    "silence in stereo": (wav(np.stack([QUIET, QUIET], 1)), 1.0, ()),
    "peaks of 15": (wav(SPEECH / np.abs(SPEECH).max() * 15), 1.5, ()),
    "mp4": (by_ffmpeg("ipod", "aac"), 1.5, ()),
    "adts aac": (by_ffmpeg("adts", "aac"), 1.5, ()),
    "webm": (by_ffmpeg("webm", "libopus"), 1.5, ()),
    "wma": (by_ffmpeg("asf", "wmav2"), 1.5, ()),
}
# Name -> file, reason, and words of the error.
REFUSED = {
    "flac that says twice its length": (flac_of_length(2 * len(SPEECH)), "breaks off", "shorter than its header"),
    "flac without its last bytes": (FLAC[:-10], "unreadable", "not readable audio"),
    "flac with noise": (with_damage(written(np.tile(SPEECH, 40), format="FLAC")), "unreadable", "not readable audio"),
    "wav cut in half": (wav(SPEECH)[: 2 * len(SPEECH)], "breaks off", "copy the file again"),
    "aiff cut in half": (written(format="AIFF")[: len(SPEECH)], "breaks off", "copy the file again"),
    "opus, noise, opus": (OPUS + b"x" * 100 + OPUS, "breaks off", "copy the file again"),
    "vorbis without a page": (b"OggS".join(PAGES[:6] + PAGES[7:]), "breaks off", "shorter than its header"),
    "chained opus": (OPUS + OPUS, "chained Ogg", "one after another"),
    "16-bit integers as floats": (wav(SPEECH * 32768), "out of range", "outside .* scale the samples"),
    "peaks of 17": (wav(SPEECH / np.abs(SPEECH).max() * 17), "out of range", "samples up to 17"),
    "1 Hz": (with_rate(wav(SPEECH), 1), "sample rate", "is 1 Hz, outside the range from 1 kHz to 1 MHz"),
    "nothing": (b"", "empty", "0 bytes"),
    "no samples": (wav(SPEECH[:0]), "empty", "contains 0 audio samples"),
    "NaN": (wav(np.full(4000, np.nan, np.float32)), "non-finite", "NaN or infinite"),
    "half a header": (wav(SPEECH)[:40], "unreadable", "not readable audio"),
    "a playlist": (b"#EXTM3U\n#EXTINF:9,\nhttp://127.0.0.1:9/a.aac\n", "unreadable", "not readable audio"),
    "mp4 of nothing": (by_ffmpeg("ipod", "aac")[:40], "unreadable", "not readable audio"),
}


@pytest.mark.parametrize("form", ["WAV PCM_16", "WAV PCM_24", "FLAC PCM_16", "MP3", "OGG OPUS", "OGG VORBIS"])
def test_every_format_keeps_the_level(form):
    heard_S = read_audio(written(**dict(zip(("format", "subtype"), form.split(), strict=False))), RATE).samples_S
    assert heard_S.norm().item() == pytest.approx(np.linalg.norm(SPEECH), rel=0.02)


def test_stereo_is_averaged():
    samples = np.stack([np.full(RATE, 0.5), np.full(RATE, -0.25)], axis=1)
    assert torch.equal(read_audio(wav(samples), RATE).samples_S, torch.full((RATE,), 0.125))


def test_reading_stops_at_the_limit(tmp_path):
    path = tmp_path / "two_hours.wav"
    with soundfile.SoundFile(path, "w", 8_000, 1, subtype="PCM_U8", format="WAV") as file:
        for _ in range(120):
            file.write(np.zeros(8_000 * 60, dtype=np.float32))
    waveform = read_audio(path, RATE, max_seconds=20)
    assert waveform.is_cut and len(waveform.samples_S) == 20 * RATE
    for max_seconds in (0.9999, 1.0, 1.5):
        content = written(np.zeros((44_100, 2)), 44_100, format="FLAC")
        assert read_audio(content, RATE, max_seconds=max_seconds).is_cut == (max_seconds < 1)


@pytest.mark.parametrize("name", READ)
def test_odd_audio_is_read(name, tmp_path):
    content, seconds, audio_warnings = READ[name]
    path = tmp_path / "clip"
    path.write_bytes(content)
    for source in (content, path):
        waveform = read_audio(source, RATE, name=name)
        assert waveform.samples_S.is_contiguous() and bool(torch.isfinite(waveform.samples_S).all())
        assert waveform.audio_warnings == audio_warnings and not waveform.is_cut
        assert waveform.seconds == pytest.approx(seconds, abs=0.1)  # lossy formats add padding
    if "silence" not in name:  # the content is the speech; some formats delay it
        heard = waveform.samples_S.numpy()[-len(SPEECH) :]
        spoken = SPEECH[: len(heard)]
        match = scipy.signal.correlate(heard, spoken).max() / np.linalg.norm(heard) / np.linalg.norm(spoken)
        assert match > 0.9


@pytest.mark.parametrize("name", REFUSED)
def test_odd_audio_is_refused(name, tmp_path):
    content, reason, words = REFUSED[name]
    path = tmp_path / "clip"
    path.write_bytes(content)
    for source in (content, path):
        with pytest.raises(AudioError, match=words) as error:
            read_audio(source, RATE, name="clip")
        assert error.value.reason == reason and "'clip'" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(AudioError, match="'clip' is 80.0 ms long, less than one codec frame"):
        read_audio(wav(SPEECH[:1919]), RATE, min_samples=1920, name="clip")
    with pytest.raises(AudioError, match="does not exist"):
        read_audio(tmp_path / "nothing.wav", RATE)
    with pytest.raises(AudioError, match="is a folder; choose"):
        read_audio(tmp_path, RATE)


@pytest.mark.parametrize("subtype", ["OPUS", "VORBIS"])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_ogg_that_breaks_off_is_refused(subtype, share):
    whole = written(np.tile(SPEECH, 8), format="OGG", subtype=subtype)
    with pytest.raises(AudioError) as error:
        read_audio(whole[: int(share * len(whole))], RATE)
    assert error.value.reason == "breaks off"
    assert read_audio(whole[: int(share * len(whole))], RATE, max_seconds=1.0).is_cut  # the end is not read


@pytest.mark.parametrize("kind", ["mp4", "adts aac", "webm", "wma"])
def test_without_ffmpeg_the_sentence_names_the_extra(kind, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(AudioError, match="uv sync --inexact --extra ffmpeg") as error:
        read_audio(READ[kind][0], RATE, name="clip")
    assert error.value.reason == "needs FFmpeg"


def test_raw_is_not_guessed(tmp_path):
    """For a file name with the ending .raw, soundfile would need the sample rate as an argument."""
    path = tmp_path / "clip.raw"
    path.write_bytes(np.arange(9000, dtype=np.int16).tobytes())
    with pytest.raises(AudioError, match="not readable audio"):
        read_audio(path, RATE)
    path.write_bytes(OPUS)
    assert read_audio(path, RATE).seconds == pytest.approx(1.5, abs=0.08)


@pytest.mark.parametrize("rate_hz", [8_000, 11_025, 16_000, 22_050, 44_100, 44_101, 48_000, 96_000])
def test_resampling_in_blocks_is_resampling_at_once(rate_hz):
    """The error of a resampled tone is below -100 dB."""
    times = np.arange(rate_hz * 10) / rate_hz
    tone = 0.5 * np.sin(2 * np.pi * 1000 * times).astype(np.float32)
    heard = read_audio(wav(tone, rate_hz), RATE).samples_S.numpy()
    assert np.array_equal(heard, resample(tone, rate_hz, RATE))
    expected = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(len(heard)) / RATE)
    inner = slice(RATE, -RATE)
    assert np.abs(heard - expected)[inner].max() < 1e-5 and len(heard) == RATE * 10


def test_peaks_are_judged_in_every_channel_and_block():
    samples = np.stack([SPEECH, np.zeros_like(SPEECH)], 1)
    samples[-1, 1] = MAX_PEAK * 1.01
    with pytest.raises(AudioError, match="outside .-1, 1."):
        read_audio(wav(samples), RATE)
    assert read_audio(wav(samples), RATE, max_seconds=1.0).is_cut  # the peak is not read


def test_mutated_files_are_clips_or_have_a_reason():
    """Read 500 files of scripts/benchmarks/fuzz_audio.py in a monitored process."""
    fuzzer = fuzz_audio.Fuzzer(TINY / "prompt.wav", seed=0)
    outcomes = dict(fuzz_audio.read_all(fuzzer, range(500), max_seconds=10.0, num_processes=1))
    assert sorted(outcomes) == list(range(500))
    for index, outcome in outcomes.items():
        assert "FAULT" not in outcome.kind, (index, outcome)
        assert outcome.seconds < 10 and outcome.megabytes < 1000, (index, outcome)
    kinds = {outcome.kind for outcome in outcomes.values()}
    assert {"a clip", "breaks off", "chained Ogg", "unreadable", "non-finite", "out of range"} <= kinds
