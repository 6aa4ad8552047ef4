"""Read mutated audio files. For each file, the reader must return a clip or raise an error with a reason.

    uv run python scripts/benchmarks/fuzz_audio.py --num_files 10000 --seed 0

Speech is written in every supported format and then damaged: bits are flipped, the start or the end is cut off,
header fields get odd values, and parts are swapped, repeated, or replaced by parts of another file. With the same
seed, file ``i`` always has the same mutations. Child processes read the files. A fault is a crash, a read that takes
longer than --max_seconds, or a read that needs more memory than --max_megabytes.
"""

import io
import json
import math
import multiprocessing
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import soundfile
from measuring import peak_mb

from llama_mimi.audio.reading import AudioError, read_audio
from llama_mimi.common.command_line import run_command
from llama_mimi.common.errors import UserError

RATE_HZ, MAX_SECONDS = 24_000, 20.0  # as in training
FILES_PER_PROCESS = 500
# Formats that libsndfile writes and reads, and then formats that PyAV writes and only FFmpeg reads.
WAV_SUBTYPES = {
    **{"PCM_U8": 8_000, "PCM_16": 16_000, "PCM_24": 44_100, "PCM_32": 48_000, "FLOAT": 24_000, "DOUBLE": 22_050},
    **{"ULAW": 8_000, "ALAW": 8_000, "IMA_ADPCM": 16_000, "MS_ADPCM": 16_000, "GSM610": 8_000},
}
SNDFILE = [("WAV", subtype, rate_hz) for subtype, rate_hz in WAV_SUBTYPES.items()]
SNDFILE += [(form, "PCM_16", 16_000) for form in ("WAVEX", "RF64", "W64")]
SNDFILE += [("AIFF", "PCM_16", 44_100), ("AU", "PCM_16", 16_000), ("CAF", "PCM_16", 48_000), ("NIST", "PCM_16", 16_000)]
SNDFILE += [("FLAC", "PCM_16", 16_000), ("FLAC", "PCM_24", 44_100)]
SNDFILE += [("OGG", "VORBIS", 44_100), ("OGG", "OPUS", 48_000), ("MP3", "MPEG_LAYER_III", 44_100)]
FFMPEG = [("ipod", "aac", 44_100), ("adts", "aac", 16_000), ("webm", "libopus", 48_000), ("asf", "wmav2", 44_100)]
ODD_NUMBERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)
HEADER_BYTES = 256


class Outcome(NamedTuple):
    kind: str  # "a clip" with its warnings, or the reason of an error
    seconds: float
    megabytes: float  # peak memory minus the memory before the read, in MB


def fuzz_audio(
    num_files: int = 10_000,
    seed: int = 0,
    speech: Path = Path("assets/tiny/prompt.wav"),
    max_seconds: float = 10.0,
    max_megabytes: float = 1000.0,
) -> None:
    """Read mutated files, and count the results.

    Args:
        speech: recording that is written in every format and then damaged
    """
    fuzzer, slowest, largest = Fuzzer(speech, seed), 0.0, 0.0
    counts: Counter[str] = Counter()
    for index, outcome in read_all(fuzzer, range(num_files), max_seconds):
        slowest, largest = max(slowest, outcome.seconds), max(largest, outcome.megabytes)
        is_large = outcome.seconds > max_seconds or outcome.megabytes > max_megabytes
        kind = "FAULT: too slow or too large" if is_large else outcome.kind
        counts[kind] += 1
        if kind.startswith("FAULT"):
            print(f"file {index} ({fuzzer.content(index)[0]}): {outcome}", flush=True)
        if counts.total() % 1000 == 0:
            print(f"{counts.total():,} files", flush=True)
    print(f"\n| {num_files:,} files, seed {seed} | |\n|---|---|")
    for kind, number in counts.most_common():
        print(f"| {kind} | {number:,} |")
    print(f"\nslowest file: {slowest:.2f} s; largest increase of memory: {largest:,.0f} MB")
    if num_faults := sum(number for kind, number in counts.items() if kind.startswith("FAULT")):
        raise UserError(
            f"{num_faults:,} of {num_files:,} files caused a fault (printed above); fix llama_mimi/audio/reading.py"
        )


class Fuzzer:
    """Numbered audio files with random mutations.

    Args:
        speech: recording; its first 1.5 s are written in every format, in mono and stereo.
        seed: seed of all mutations.
    """

    def __init__(self, speech: Path, seed: int) -> None:
        self._seed = seed
        self.originals: dict[str, bytes] = {}
        for channels in (1, 2):
            for form, subtype, rate_hz in SNDFILE + FFMPEG:
                if subtype == "GSM610" and channels > 1:
                    continue  # GSM is mono only
                samples_S = read_audio(speech, rate_hz, max_seconds=1.5).samples_S.numpy()
                samples_SC = np.stack([samples_S * (1 - 0.2 * c) for c in range(channels)], axis=1)
                if (form, subtype, rate_hz) in FFMPEG:
                    content = written_by_ffmpeg(samples_SC, form, subtype, rate_hz)
                else:
                    stream = io.BytesIO()
                    soundfile.write(stream, samples_SC, rate_hz, format=form, subtype=subtype)
                    content = stream.getvalue()
                self.originals[f"{form} {subtype}, {channels} channels"] = content
        opus, vorbis = (self.originals[f"OGG {subtype}, 1 channels"] for subtype in ("OPUS", "VORBIS"))
        self.originals |= dict.fromkeys(("a chained Ogg", "another chained Ogg"), opus + vorbis + opus)

    def content(self, index: int) -> tuple[str, bytes]:
        """Return the format and the bytes of file ``index``."""
        rng, contents = np.random.default_rng((self._seed, index)), list(self.originals.values())
        original = rng.integers(len(contents))
        content = bytearray(contents[original])
        for _ in range(rng.integers(1, 4)):
            mutation = MUTATIONS[rng.integers(len(MUTATIONS))]
            content = mutation(content or bytearray(1), rng, contents)
        return list(self.originals)[original], bytes(content)


def written_by_ffmpeg(samples_SC: np.ndarray, form: str, codec: str, rate_hz: int) -> bytes:
    stream = io.BytesIO()
    layout = ("mono", "stereo")[samples_SC.shape[1] - 1]
    with av.open(stream, "w", format=form) as container:
        audio: Any = container.add_stream(codec, rate=rate_hz, layout=layout)
        audio.bit_rate = 64_000
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples_SC.T), format="fltp", layout=layout)
        frame.sample_rate = rate_hz
        for packet in [*audio.encode(frame), *audio.encode(None)]:
            container.mux(packet)
    return stream.getvalue()


def _flip_bits(content: bytearray, rng: np.random.Generator, _: Any) -> bytearray:
    for _ in range(int(2 ** rng.uniform(0, 8))):
        content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    return content


def _cut(content: bytearray, rng: np.random.Generator, _: Any) -> bytearray:
    at = int(rng.integers(min(len(content), HEADER_BYTES) if rng.random() < 0.3 else len(content)))
    return content[:at] if rng.random() < 0.7 else content[at:]


def _set_header_field(content: bytearray, rng: np.random.Generator, _: Any) -> bytearray:
    size = int(rng.choice((1, 2, 4, 8)))
    number = ODD_NUMBERS[rng.integers(len(ODD_NUMBERS))] if rng.random() < 0.7 else int(rng.integers(2**32))
    at = int(rng.integers(min(len(content), HEADER_BYTES)))
    value = (number % 256**size).to_bytes(size, "little" if rng.random() < 0.5 else "big")
    content[at : at + size] = value
    return content


def _swap_parts(content: bytearray, rng: np.random.Generator, _: Any) -> bytearray:
    a, b, c = sorted(rng.integers(len(content) + 1, size=3).tolist())
    return content[:a] + content[b:c] + content[a:b] + content[c:]


def _repeat_part(content: bytearray, rng: np.random.Generator, _: Any) -> bytearray:
    a, b = sorted(rng.integers(len(content) + 1, size=2).tolist())
    return content[:b] + content[a:b] * int(rng.integers(1, 4)) + content[b:]


def _splice(content: bytearray, rng: np.random.Generator, contents: Sequence[bytes]) -> bytearray:
    other = contents[int(rng.integers(len(contents)))]
    return content[: rng.integers(len(content) + 1)] + other[rng.integers(len(other)) :]


# Header fields are mutated twice as often, because readers trust them.
MUTATIONS = (_flip_bits, _cut, _set_header_field, _set_header_field, _swap_parts, _repeat_part, _splice)


def read_all(
    fuzzer: Fuzzer, indices: Sequence[int], max_seconds: float, num_processes: int = os.cpu_count() or 1
) -> Iterator[tuple[int, Outcome]]:
    """Read all files and yield (index, outcome); replace each process that dies or hangs."""
    parts = [indices[at : at + FILES_PER_PROCESS] for at in range(0, len(indices), FILES_PER_PROCESS)]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(num_processes) as pool:
        for found in pool.map(lambda files: _read_watched(fuzzer, files, Path(folder), max_seconds), parts):
            yield from found


def _read_watched(fuzzer: Fuzzer, files: Sequence[int], folder: Path, max_seconds: float) -> list[tuple[int, Outcome]]:
    found: list[tuple[int, Outcome]] = []
    while left := files[len(found) :]:
        log = folder / str(left[0])
        log.touch()
        args = fuzzer, left, log, max_seconds
        process = multiprocessing.get_context("fork").Process(target=_read_files, args=args)
        process.start()
        process.join()
        found += zip(left, (Outcome(*json.loads(line)) for line in log.read_text().splitlines()), strict=False)
        if len(found) < len(files):
            found.append((files[len(found)], Outcome(f"FAULT: exit code {process.exitcode}", 0.0, 0.0)))
    return found


def _read_files(fuzzer: Fuzzer, files: Sequence[int], log: Path, max_seconds: float) -> None:
    """Read files and log the outcomes. Files with odd indices are read from disk. SIGALRM ends a process that hangs."""
    signal.alarm(60)  # for a deadlock before the first file
    path = log.with_suffix(".audio")
    for index in files:
        _, content = fuzzer.content(index)
        signal.alarm(math.ceil(3 * max_seconds))  # more than a slow file needs on a busy machine
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak resident set, see proc(5)
        before, start = peak_mb(), time.perf_counter()
        try:
            if index % 2:
                path.write_bytes(content)
            waveform = read_audio(path if index % 2 else content, RATE_HZ, max_seconds=MAX_SECONDS, min_samples=1920)
            kind = ", ".join(["a clip", *waveform.audio_warnings])
        except AudioError as error:
            kind = error.reason
        except BaseException as error:
            kind = f"FAULT: {type(error).__name__}: {error}"
        with log.open("a") as file:
            print(json.dumps(Outcome(kind, time.perf_counter() - start, peak_mb() - before)), file=file)


if __name__ == "__main__":
    run_command(fuzz_audio, __doc__)
