"""Read mutated audio files: none may crash or hang the reader or fill the memory; each is a clip or a named reason.

    uv run python scripts/benchmarks/fuzz_audio.py --num_files 10000 --seed 0

Speech is written in every format that is read and then damaged: bits flipped, ends cut off, header fields set to odd
values, parts swapped, repeated or put from one file into another. File ``i`` of a seed is always the same. Files are
read in processes of their own, which are watched from outside: one that dies or takes over --max_seconds is a fault, as
is one file that takes more than --max_megabytes over what the process held when it began.
"""

import io
import multiprocessing
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile
from measuring import peak_mb

from llama_mimi.audio.reading import AudioError, read_audio
from llama_mimi.common.command_line import run_command
from llama_mimi.common.errors import UserError

RATE_HZ, MAX_SECONDS = 24_000, 20.0  # as training reads
FILES_PER_PROCESS = 500
# What libsndfile writes and reads, and what PyAV writes that FFmpeg alone reads here.
SNDFILE = [
    ("WAV", subtype, rate_hz)
    for subtype, rate_hz in (
        ("PCM_U8", 8_000),
        ("PCM_16", 16_000),
        ("PCM_24", 44_100),
        ("PCM_32", 48_000),
        ("FLOAT", 24_000),
        ("DOUBLE", 22_050),
        ("ULAW", 8_000),
        ("ALAW", 8_000),
        ("IMA_ADPCM", 16_000),
        ("MS_ADPCM", 16_000),
        ("GSM610", 8_000),
    )
] + [
    ("WAVEX", "PCM_16", 16_000),
    ("RF64", "PCM_16", 16_000),
    ("W64", "PCM_16", 16_000),
    ("AIFF", "PCM_16", 44_100),
    ("AU", "PCM_16", 16_000),
    ("CAF", "PCM_16", 48_000),
    ("NIST", "PCM_16", 16_000),
    ("FLAC", "PCM_16", 16_000),
    ("FLAC", "PCM_24", 44_100),
    ("OGG", "VORBIS", 44_100),
    ("OGG", "OPUS", 48_000),
    ("MP3", "MPEG_LAYER_III", 44_100),
]
FFMPEG = [("ipod", "aac", 44_100), ("adts", "aac", 16_000), ("webm", "libopus", 48_000), ("asf", "wmav2", 44_100)]
ODD_NUMBERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)
HEADER_BYTES = 256


@dataclass(frozen=True)
class Outcome:
    """What became of one file: "a clip", with its warnings, or a reason; seconds, and megabytes at the peak."""

    kind: str
    seconds: float
    megabytes: float


def fuzz_audio(
    num_files: int = 10_000,
    seed: int = 0,
    speech: Path = Path("assets/tiny/prompt.wav"),
    max_seconds: float = 10.0,
    max_megabytes: float = 1000.0,
    faults_dir: Path | None = None,
) -> None:
    """Read mutated files, and count what becomes of them.

    Args:
        speech: what is written and damaged
        faults_dir: keep files at fault here
    """
    fuzzer = Fuzzer(speech, seed)
    outcomes: Counter[str] = Counter()
    faults: list[str] = []
    slowest, largest = 0.0, 0.0
    for index, outcome in read_all(fuzzer, range(num_files), max_seconds):
        kind = outcome.kind
        slowest, largest = max(slowest, outcome.seconds), max(largest, outcome.megabytes)
        if outcome.seconds > max_seconds or outcome.megabytes > max_megabytes:
            kind = f"FAULT: {kind} after {outcome.seconds:.1f} s with {outcome.megabytes:,.0f} MB"
        outcomes[kind.split(" after ")[0]] += 1
        if kind.startswith("FAULT"):
            faults.append(f"file {index} ({fuzzer.describe(index)}): {kind}")
            print(faults[-1], flush=True)
            if faults_dir:
                faults_dir.mkdir(parents=True, exist_ok=True)
                (faults_dir / f"{seed}-{index}").write_bytes(fuzzer.content(index))
        if sum(outcomes.values()) % 1000 == 0:
            print(f"{sum(outcomes.values()):,} files", flush=True)
    print(f"\n| {num_files:,} files, seed {seed} | |\n|---|---|")
    for kind, number in outcomes.most_common():
        print(f"| {kind} | {number:,} |")
    print(f"\nslowest {slowest:.2f} s, {largest:,.0f} MB more than before at most")
    if faults:
        raise UserError(f"{len(faults):,} of {num_files:,} files crashed, hung or filled the memory; see above")


class Fuzzer:
    """Files by number.

    Args:
        speech: audio of which the first 1.5 s are written in every format, mono and stereo.
        seed: all mutations follow from it.
    """

    def __init__(self, speech: Path, seed: int) -> None:
        self._seed = seed
        self.originals: list[tuple[str, bytes]] = []
        for channels in (1, 2):
            for form, subtype, rate_hz in SNDFILE + FFMPEG:
                if subtype == "GSM610" and channels > 1:
                    continue  # mono alone
                samples_S = read_audio(speech, rate_hz, max_seconds=1.5).samples_S.numpy()
                samples_SC = np.stack([samples_S * (1 - 0.2 * c) for c in range(channels)], axis=1)
                if (form, subtype, rate_hz) in FFMPEG:
                    content = written_by_ffmpeg(samples_SC, form, subtype, rate_hz)
                else:
                    stream = io.BytesIO()
                    soundfile.write(stream, samples_SC, rate_hz, format=form, subtype=subtype)
                    content = stream.getvalue()
                self.originals.append((f"{form} {subtype}, {channels} channels", content))
        of_kind = dict(self.originals)
        opus, vorbis = (of_kind[f"OGG {subtype}, 1 channels"] for subtype in ("OPUS", "VORBIS"))
        self.originals += [("a chain", opus + vorbis + opus)] * 2

    def content(self, index: int) -> bytes:
        """The bytes of file ``index``."""
        rng = self._rng(index)
        content = bytearray(self.originals[int(rng.integers(len(self.originals)))][1])
        for _ in range(rng.integers(1, 4)):
            mutation = MUTATIONS[rng.integers(len(MUTATIONS))]
            content = mutation(content or bytearray(1), rng, self.originals)
        return bytes(content)

    def describe(self, index: int) -> str:
        return self.originals[self._rng(index).integers(len(self.originals))][0]

    def _rng(self, index: int) -> np.random.Generator:
        return np.random.default_rng((self._seed, index))


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


def _splice(content: bytearray, rng: np.random.Generator, originals: Sequence[tuple[str, bytes]]) -> bytearray:
    other = originals[int(rng.integers(len(originals)))][1]
    return content[: rng.integers(len(content) + 1)] + other[rng.integers(len(other)) :]


MUTATIONS: tuple[Callable[..., bytearray], ...] = (
    _flip_bits,
    _cut,
    _set_header_field,
    _set_header_field,  # what readers trust
    _swap_parts,
    _repeat_part,
    _splice,
)


def read_one(content: bytes, path: Path | None) -> str:
    """What becomes of a file: "a clip" with its warnings, or the reason why it is none.

    Args:
        content: its bytes.
        path: write them there and read from there, or None.

    Raises:
        Exception: nothing but `AudioError` should come out of `read_audio`.
    """
    if path is not None:
        path.write_bytes(content)
    try:
        waveform = read_audio(path or content, RATE_HZ, max_seconds=MAX_SECONDS, min_samples=1920)
    except AudioError as error:
        return error.reason
    return ", ".join(["a clip", *waveform.audio_warnings])


def read_all(
    fuzzer: Fuzzer, indices: Sequence[int], max_seconds: float, num_processes: int = os.cpu_count() or 1
) -> Any:
    """Yields (index, Outcome) of all files, read by processes that are begun anew when one dies or hangs."""
    context = multiprocessing.get_context("fork")
    folder = tempfile.TemporaryDirectory()  # where every second file is read from
    shares = [list(indices[start : start + FILES_PER_PROCESS]) for start in range(0, len(indices), FILES_PER_PROCESS)]
    running: list[tuple[Any, Connection, list[int], float]] = []
    while shares or running:
        while shares and len(running) < num_processes:
            share = shares.pop(0)
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_read_share, args=(fuzzer, share, Path(folder.name), sender))
            process.start()
            sender.close()
            running.append((process, receiver, share, time.monotonic()))
        ready = multiprocessing.connection.wait([receiver for _, receiver, *_ in running], timeout=0.5)
        for place, (process, receiver, share, since) in reversed(list(enumerate(running))):
            if receiver in ready:
                try:
                    outcome = receiver.recv()
                except EOFError:  # the process has ended
                    process.join()
                    running.pop(place)
                    if share:
                        yield share[0], Outcome(f"FAULT: exit code {process.exitcode}", 0.0, 0.0)
                        shares.insert(0, share[1:])
                    continue
                yield share.pop(0), outcome
                running[place] = (process, receiver, share, time.monotonic())
            elif time.monotonic() - since > 3 * max_seconds:  # it is slow before it hangs, and the machine may be busy
                process.kill()
                process.join()
                running.pop(place)
                yield share[0], Outcome("FAULT: hung", time.monotonic() - since, 0.0)
                shares.insert(0, share[1:])


def _read_share(fuzzer: Fuzzer, share: Sequence[int], folder: Path, sender: Connection) -> None:
    path = folder / str(os.getpid())
    for index in share:
        content = fuzzer.content(index)
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak resident set to what is held now
        before = peak_mb()
        start = time.perf_counter()
        try:
            kind = read_one(content, path if index % 2 else None)
        except BaseException as error:
            kind = f"FAULT: {type(error).__name__}: {error}"
        sender.send(Outcome(kind, time.perf_counter() - start, peak_mb() - before))


if __name__ == "__main__":
    run_command(fuzz_audio, __doc__)
