"""What reading audio costs, and what its resampler does, in three tables: rates, formats, and what a rank needs.

    uv run python scripts/benchmarks/bench_reading.py
    uv run python scripts/benchmarks/bench_reading.py --corpus spoken_digits/train.parquet --codec kyutai/mimi

The resampler of `read_audio` (soxr) stands beside torchaudio's default, which this project used before. Speech is
brought to each rate by a third one (SciPy's). Speeds are audio-seconds per second of one core, the median of --repeats
runs in turn. Quality is measured on tones: what is left of one at 90 % of the lower of the two bands, and the strongest
thing that is not there, an image of that tone or, where the rate is lowered, an alias of one at 110 %.
"""

import io
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from math import gcd
from typing import Any

import numpy as np
import scipy.signal
import soundfile
import torch
import torchaudio.functional
from bench_data import GPU_TOKENS_PER_S, audio_reader, read_clips
from fuzz_audio import written_by_ffmpeg
from measuring import in_turn, machine
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
    originals = [clip.samples_S.numpy() for clip in read_clips(audio_reader(corpus, mimi), clips)]
    seconds = sum(map(len, originals)) / rate_hz
    print(machine())
    print(f"{len(originals)} clips, {seconds:,.0f} s")

    print(f"\n| to {rate_hz:,} Hz from | by | audio-s/s | tone at 90 % | what is not there | codes that differ |")
    print("|---|---|---|---|---|---|")
    ways = {"soxr": resample, "torchaudio": by_torchaudio}
    for source_hz in RATES_HZ:
        at_rate = [by_scipy(clip_S, rate_hz, source_hz) for clip_S in originals]
        timed = {name: partial(seconds_of, way, at_rate, source_hz, rate_hz) for name, way in ways.items()}
        taken = {name: statistics.median(times) for name, times in in_turn(timed, repeats).items()}
        codes = {}
        for name, way in ways.items():
            codes[name] = mimi.encode_many(list(map(torch.from_numpy, each(way, at_rate, source_hz, rate_hz))))
        for name, way in ways.items():
            differing = "" if name == "soxr" else "{:.2f} % (level 0: {:.2f} %)".format(*difference(*codes.values()))
            kept, stray = quality(way, source_hz, rate_hz)
            print(
                f"| {source_hz:,} Hz | {name} | {seconds / taken[name]:,.0f} | {kept:+.2f} dB | {stray:.0f} dB | "
                f"{differing} |",
                flush=True,
            )

    needed = GPU_TOKENS_PER_S / (4 * mimi.frame_rate_hz)
    gflops = encoding_flops(num_quantizers) / 1e9
    fed = 1000 * GPU_TFLOPS / gflops / 2
    print(
        f"\nMimi encodes a second of audio in {gflops:.1f} GFLOPs ({num_quantizers} levels): {fed:,.0f} audio-s/s if a "
        f"GPU reaches half of an H100's {GPU_TFLOPS:g} TFLOP/s in float32"
    )
    print(
        f"\n| file | read and resampled, audio-s/s | processes for {needed:,.0f} audio-s/s, which training eats | "
        f"for {fed:,.0f}, which tokenising eats |"
    )
    print("|---|---|---|---|")
    for name, (form, subtype, source_hz) in FORMATS.items():
        files = [encoded(by_scipy(clip_S, rate_hz, source_hz), form, subtype, source_hz) for clip_S in originals]
        took = statistics.median(seconds_of(read_audio, files, rate_hz) for _ in range(repeats))
        rate = seconds / took
        print(f"| {name} | {rate:,.0f} | {needed / rate:.1f} | {fed / rate:.1f} |", flush=True)


def encoding_flops(num_quantizers: int, seconds: float = 10.0) -> float:
    """FLOPs of the products that a Mimi of the released shape does to encode a second of audio; a product and a sum
    are two.
    """
    model = MimiModel(MimiConfig()).eval()
    audio_11S = torch.zeros(1, 1, round(seconds * model.config.sampling_rate))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.encode(audio_11S, num_quantizers=num_quantizers)
    return counter.get_total_flops() / seconds


def each(way: Callable[..., Any], items: Sequence[Any], *args: int) -> list[Any]:
    return [way(item, *args) for item in items]


def seconds_of(way: Callable[..., Any], items: Sequence[Any], *args: int) -> float:
    start = time.perf_counter()
    each(way, items, *args)
    return time.perf_counter() - start


def by_torchaudio(samples_S: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
    return torchaudio.functional.resample(torch.from_numpy(samples_S), from_hz, to_hz).numpy()


def by_scipy(samples_S: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
    divisor = gcd(from_hz, to_hz)
    window = ("kaiser", 12.0)
    return scipy.signal.resample_poly(samples_S, to_hz // divisor, from_hz // divisor, window=window).astype(np.float32)


def quality(way: Callable[[np.ndarray, int, int], np.ndarray], from_hz: int, to_hz: int) -> tuple[float, float]:
    """Gain of a tone at 90 % of the lower band, and the strongest other component that a tone leaves, both in dB.

    That tone is at 110 % of the band where the rate is lowered (an alias), at 90 % where it is raised (an image).
    """
    band_hz = min(from_hz, to_hz) / 2
    inside = spectrum_of(way, 0.9 * band_hz, from_hz, to_hz)
    outside = spectrum_of(way, 1.1 * band_hz, from_hz, to_hz) if to_hz < from_hz else inside
    at = round(0.9 * band_hz * len(inside) / (to_hz / 2))
    stray = np.delete(outside, slice(at - 50, at + 50)) if outside is inside else outside
    return float(20 * np.log10(inside.max())), float(20 * np.log10(stray.max()))


def spectrum_of(way: Callable[..., np.ndarray], tone_hz: float, from_hz: int, to_hz: int) -> np.ndarray:
    """Amplitudes in the middle 4 s of a tone of amplitude 1."""
    tone = np.sin(2 * np.pi * tone_hz * np.arange(6 * from_hz) / from_hz).astype(np.float32)
    middle = way(tone, from_hz, to_hz)[to_hz : 5 * to_hz].astype(np.float64)
    window = scipy.signal.windows.kaiser(len(middle), 20)
    return np.abs(np.fft.rfft(middle * window)) * 2 / window.sum()


def difference(ours: list[torch.Tensor], other: list[torch.Tensor]) -> tuple[float, float]:
    """Percent of codes that differ, of all levels and of level 0."""
    pairs = [(a[: min(len(a), len(b))], b[: min(len(a), len(b))]) for a, b in zip(ours, other, strict=True)]
    differs_TQ = torch.cat([a != b for a, b in pairs]).float()
    return 100 * float(differs_TQ.mean()), 100 * float(differs_TQ[:, 0].mean())


def encoded(samples_S: np.ndarray, form: str, subtype: str, rate_hz: int) -> bytes:
    if form == "ipod":
        return written_by_ffmpeg(samples_S[:, None], form, subtype, rate_hz)
    stream = io.BytesIO()
    soundfile.write(stream, samples_S.clip(-1, 1), rate_hz, format=form, subtype=subtype)
    return stream.getvalue()


if __name__ == "__main__":
    run_command(bench_reading, __doc__)
