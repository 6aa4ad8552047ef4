"""Measure the speed of reading audio, the quality of resampling, and the number of reading processes that a GPU needs.

    uv run python scripts/benchmarks/bench_reading.py
    uv run python scripts/benchmarks/bench_reading.py --corpus spoken_digits/train.parquet --codec kyutai/mimi

SciPy resamples the speech to each source rate. A speed is the median of --repeats runs on one core, in audio-seconds
per second.
Tones measure the quality of resampling. The first number in dB is the gain of a tone at 90 % of the lower Nyquist
frequency. The second number in dB is the level of the strongest unwanted component. In upsampling, this component is an
image of the same tone. In downsampling, it is the alias of a tone at 110 % of the lower Nyquist frequency.
"""

import io
import statistics
import timeit
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.signal
import soundfile
import torch
from bench_data import GPU_TOKENS_PER_S, audio_reader, read_clips
from fuzz_audio import written_by_ffmpeg
from measuring import machine
from soxr import resample
from torch.utils.flop_counter import FlopCounterMode
from transformers import MimiConfig, MimiModel

from llama_mimi.audio.mimi import MimiCodec
from llama_mimi.audio.reading import read_audio
from llama_mimi.common.command_line import run_command

RATES_HZ = (8_000, 16_000, 22_050, 44_100, 48_000)
GPU_TFLOPS = 67.0  # float32 without tensor cores: NVIDIA's data sheet of the H100 SXM
FORMATS = {
    "WAV, 16 kHz": ("WAV", "PCM_16", 16_000),
    "FLAC, 16 kHz": ("FLAC", "PCM_16", 16_000),
    "FLAC, 48 kHz": ("FLAC", "PCM_16", 48_000),
    "MP3, 24 kHz": ("MP3", "MPEG_LAYER_III", 24_000),
    "MP3, 44.1 kHz": ("MP3", "MPEG_LAYER_III", 44_100),
    "Ogg Opus, 48 kHz": ("OGG", "OPUS", 48_000),
    "Ogg Vorbis, 44.1 kHz": ("OGG", "VORBIS", 44_100),
    "M4A (AAC), 44.1 kHz": ("ipod", "aac", 44_100),
}


def bench_reading(
    corpus: str = "assets/tiny/corpus/train-*.parquet",
    codec: str = "assets/tiny/mimi",
    num_quantizers: int = 8,
    clips: int = 64,
    repeats: int = 5,
) -> None:
    torch.set_num_threads(1)
    mimi = MimiCodec(codec, num_quantizers)
    rate_hz = mimi.sample_rate_hz
    originals = [clip.samples_S for clip in read_clips(audio_reader(corpus, mimi), clips)]
    seconds = sum(map(len, originals)) / rate_hz
    print(machine())
    print(f"{len(originals)} clips, {seconds:,.0f} s\n")

    def speed(function: Callable[..., Any], items: Sequence[Any], *args: int) -> float:
        """Return the median speed of ``function``, in audio-seconds per second."""
        times = timeit.repeat(lambda: [function(item, *args) for item in items], number=1, repeat=repeats)
        return seconds / statistics.median(times)

    print(f"| to {rate_hz:,} Hz from | audio-s/s | tone at 90 % | strongest other component |\n|---|---|---|---|")
    for source_hz in RATES_HZ:
        at_rate = [scipy_resample(clip_S, rate_hz, source_hz) for clip_S in originals]
        gain_db, stray_db = quality(source_hz, rate_hz)
        rate = speed(resample, at_rate, source_hz, rate_hz)
        print(f"| {source_hz:,} Hz | {rate:,.0f} | {gain_db:+.2f} dB | {stray_db:.0f} dB |", flush=True)

    needed, gflops = GPU_TOKENS_PER_S / (4 * mimi.frame_rate_hz), encoding_flops(num_quantizers) / 1e9
    encoded = 1000 * GPU_TFLOPS / gflops / 2
    print(f"\nMimi needs {gflops:.1f} GFLOPs to encode a second of audio to {num_quantizers} levels.")
    speed_of_gpu = f"half of an H100's {GPU_TFLOPS:g} TFLOP/s in float32"
    print(f"A GPU that reaches {speed_of_gpu} would encode {encoded:,.0f} audio-s/s.\n")
    processes = f"processes for training at {needed:,.0f} audio-s/s | for tokenising at {encoded:,.0f}"
    print(f"| file | read and resampled, audio-s/s | {processes} |\n|---|---|---|---|")
    for name, (form, subtype, source_hz) in FORMATS.items():
        files = [encode(scipy_resample(clip_S, rate_hz, source_hz), form, subtype, source_hz) for clip_S in originals]
        rate = speed(read_audio, files, rate_hz)
        print(f"| {name} | {rate:,.0f} | {needed / rate:.1f} | {encoded / rate:.1f} |", flush=True)


def encoding_flops(num_quantizers: int, seconds: float = 10.0) -> float:
    """Return the FLOPs that Mimi (released shape) needs to encode 1 s of audio; only matrix products count."""
    model = MimiModel(MimiConfig()).eval()
    audio_11S = torch.zeros(1, 1, round(seconds * model.config.sampling_rate))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.encode(audio_11S, num_quantizers=num_quantizers)
    return counter.get_total_flops() / seconds


def scipy_resample(samples_S: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
    return scipy.signal.resample_poly(samples_S, to_hz, from_hz, window=("kaiser", 12.0)).astype(np.float32)


def quality(from_hz: int, to_hz: int) -> tuple[float, float]:
    """Return two levels in dB: a tone at 90 % of the lower Nyquist frequency, and the strongest image or alias."""
    band_hz = min(from_hz, to_hz) / 2
    inside = spectrum_of(0.9 * band_hz, from_hz, to_hz)
    if to_hz < from_hz:
        stray = spectrum_of(1.1 * band_hz, from_hz, to_hz)
    else:
        at = round(0.9 * band_hz * len(inside) / (to_hz / 2))
        stray = np.delete(inside, slice(at - 50, at + 50))
    return float(20 * np.log10(inside.max())), float(20 * np.log10(stray.max()))


def spectrum_of(tone_hz: float, from_hz: int, to_hz: int) -> np.ndarray:
    """Resample a tone of amplitude 1; return the amplitude spectrum of the middle 4 s."""
    tone = np.sin(2 * np.pi * tone_hz * np.arange(6 * from_hz) / from_hz).astype(np.float32)
    middle = resample(tone, from_hz, to_hz)[to_hz : 5 * to_hz].astype(np.float64)
    window = scipy.signal.windows.kaiser(len(middle), 20)
    return np.abs(np.fft.rfft(middle * window)) * 2 / window.sum()


def encode(samples_S: np.ndarray, form: str, subtype: str, rate_hz: int) -> bytes:
    if form == "ipod":
        return written_by_ffmpeg(samples_S[:, None], form, subtype, rate_hz)
    stream = io.BytesIO()
    soundfile.write(stream, samples_S.clip(-1, 1), rate_hz, format=form, subtype=subtype)
    return stream.getvalue()


if __name__ == "__main__":
    run_command(bench_reading, __doc__)
