"""Read audio of any format as mono float32 at the codec's rate, and write WAV files."""

import math
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from io import SEEK_END, BytesIO
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import soundfile
import soxr
import torch

from llama_mimi.common.errors import UserError, first_line
from llama_mimi.common.files import write_atomically

# Larger samples are integers that were stored as floats. The limit is 24 dB over full scale; mixes and lossy codecs
# exceed full scale by only a few dB.
MAX_PEAK = 16.0
AUDIO_ENDINGS = (".wav", ".flac", ".ogg", ".mp3")  # audio files in a folder; a single file may have another ending
RATES_HZ = (1_000, 1_000_000)  # other sample rates mean that the header is damaged
RESAMPLER = "soxr HQ"  # recorded with the codes, which depend on it
# Warnings about clips that are used; each is counted.
OPPOSITE = "in opposite phases, the loudest channel taken"
SHORTER = "shorter than its manifest says"
MAX_CANCELLED = 0.1  # fraction of the energy; if the mean of the channels cancels more, the loudest channel is used
FAULTS = {
    "breaks off": "is shorter than its header says; copy the file again",
    "chained Ogg": "contains several Ogg files one after another; split the file, or convert it to WAV or FLAC",
}
BLOCK_SAMPLES = 2**16  # samples to decode at once, over all channels: 0.25 MB in float32
UNKNOWN_LENGTH = 2**63 - 1  # libsndfile's length for a file that was written through a pipe
# Encodings and formats in which libsndfile seeks to the exact sample.
UNCODED = ("PCM", "FLOAT", "DOUBLE", "ULAW", "ALAW")
SEEKABLE = ("WAV", "WAVEX", "AIFF", "FLAC", "W64", "RF64")
# Formats that only FFmpeg reads (MP4, WebM, AAC, WMA), by the first bytes of a file. FFmpeg must not guess the format:
# some formats are lists of addresses, and reading a file must not cause a download.
FFMPEG_FORMATS = {
    "mov": rb".{4}ftyp",
    "matroska": rb"\x1aE\xdf\xa3",
    "aac": rb"\xff[\xf0\xf1\xf8\xf9]",  # ADTS has layer 0, MP3 has layers 1 to 3
    "asf": rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11\xa6\xd9\x00\xaa\x00\x62\xce\x6c",
}
MISCOUNTED_BYTES = 256  # tolerance for the size in a WAV or AIFF header, as some programs include the header
UNKNOWN_SIZE = 0x7FFF_F000  # larger sizes mean that the size was unknown when the header was written
# Sample rate in Hz; C; samples per channel according to the header (None if unknown or estimated); blocks (S, C).
Recording = tuple[int, int, int | None, Iterator[np.ndarray]]


class AudioError(UserError):
    """Error for an unusable clip. Unusable clips are counted by ``reason``, a category such as "unreadable"."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)  # both, so that an error can be pickled
        self.reason = reason

    def __str__(self) -> str:
        return str(self.args[1])


@dataclass(frozen=True)
class Waveform:
    """One clip in mono float32; ``audio_warnings`` may contain `OPPOSITE` and `SHORTER`."""

    samples_S: torch.Tensor
    sample_rate_hz: int
    is_cut: bool = False  # the source is longer than the requested part
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
    """Read audio as mono float32. libsndfile reads WAV, FLAC, MP3 and OGG; PyAV reads M4A, AAC, WebM and WMA.

    Channels are averaged; if they cancel each other, the loudest channel is used. Audio is decoded in blocks, until
    ``max_seconds`` are read. An `AudioError` is raised if the file is missing, damaged, not audio or too short, or if
    samples are non-finite or very large.

    Args:
        sample_rate_hz: sample rate of the result; if None, the file's rate is used.
        start_seconds: start of the part to read; in WAV, AIFF and FLAC files, earlier samples are not decoded.
        name: name of the clip in messages; default: path of the file.
        min_samples: minimum number of samples (at ``sample_rate_hz``), such as the length of one codec frame.
    """
    name = name or ("audio bytes" if isinstance(source, bytes) else str(source))
    try:
        with BytesIO(source) if isinstance(source, bytes) else open(source, "rb", buffering=0) as stream:
            if not stream.seek(0, SEEK_END):
                raise AudioError("empty", f"'{name}' is empty (0 bytes); choose a WAV, FLAC, MP3 or OGG file")
            waveform = _read(stream, name, sample_rate_hz, start_seconds, max_seconds)
    except AudioError:
        raise
    except (FileNotFoundError, IsADirectoryError) as error:
        problem = "is a folder" if isinstance(error, IsADirectoryError) else "does not exist"
        raise AudioError("missing", f"'{name}' {problem}; choose an existing audio file") from error
    except ImportError as error:
        remedy = "install it with `uv sync --inexact --extra ffmpeg`, or convert the file to WAV, FLAC, MP3 or OGG"
        raise AudioError("needs FFmpeg", f"reading '{name}' needs FFmpeg; {remedy}") from error
    except Exception as error:  # decoders raise various errors for damaged files
        problem = f"is not readable audio ({first_line(error).split(': ', 1)[-1].rstrip('.')})"
        raise AudioError("unreadable", f"'{name}' {problem}; choose a WAV, FLAC, MP3 or OGG file") from error
    if len(waveform.samples_S) < min_samples:
        milliseconds, frame = 1000 * waveform.seconds, 1000 * min_samples / waveform.sample_rate_hz
        problem = f"is {milliseconds:.1f} ms long, less than one codec frame ({frame:.0f} ms)"
        raise AudioError("too short", f"'{name}' {problem}; choose a longer clip")
    return waveform


def write_wav(path: str | Path, waveform: Waveform) -> None:
    """Clip samples to [-1, 1] and write a 16-bit PCM WAV file atomically; raise a `UserError` if this fails."""
    stream, path = BytesIO(), Path(path)
    samples_S = waveform.samples_S.clamp(-1, 1).numpy()
    soundfile.write(stream, samples_S, waveform.sample_rate_hz, format="WAV", subtype="PCM_16")
    write_atomically(str(path.parent), path.name, stream.getvalue())


@contextmanager
def wav_writer(path: str | Path, sample_rate_hz: int) -> Iterator[soundfile.SoundFile]:
    """Open a mono 16-bit PCM WAV file for streaming. If writing fails, remove the file and raise a `UserError`."""
    path = Path(path)
    is_ours = not path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        name = os.fsencode(path)  # soundfile fails for a str that is not valid UTF-8
        with soundfile.SoundFile(name, "w", sample_rate_hz, 1, format="WAV", subtype="PCM_16") as file:
            is_ours = True
            yield file
    except (OSError, soundfile.LibsndfileError) as error:
        if is_ours and path.is_file():
            path.unlink()
        problem = f"'{path}' could not be written ({first_line(error)})"
        raise UserError(f"{problem}; free disk space, or choose another folder") from error


def _read(
    stream: BinaryIO, name: str, wanted_hz: int | None, start_s: float, max_s: float | None, channel: int | None = None
) -> Waveform:
    """Read the mean of the channels, or only ``channel``. If the channels cancel each other, read the loudest one."""
    parts: list[np.ndarray] = []
    num_read, is_cut, cancelled = 0, False, 0.0
    with _opened(stream, start_s) as (rate_hz, C, num_samples, blocks):
        if not RATES_HZ[0] <= rate_hz <= RATES_HZ[1]:
            problem = f"the sample rate of '{name}' is {rate_hz:,} Hz, outside the range from 1 kHz to 1 MHz"
            raise AudioError("sample rate", f"{problem}; set the correct sample rate in the file's header")
        wanted_hz = wanted_hz or rate_hz
        resampler = soxr.ResampleStream(rate_hz, wanted_hz, 1) if wanted_hz != rate_hz else None
        limit = None if max_s is None else math.ceil(max_s * rate_hz)
        energy_C = np.zeros(C)
        for block_SC in blocks:
            if limit is not None and num_read + len(block_SC) > limit:
                is_cut, block_SC = True, block_SC[: limit - num_read]
            num_read += len(block_SC)
            _check_samples(block_SC, name)
            if C == 1:
                mono_S = block_SC[:, 0]
            elif channel is not None:
                mono_S = block_SC[:, channel].copy()  # a view would keep the other channels in memory
            else:
                mono_S = block_SC.mean(axis=1)
                of_block_C = np.square(block_SC, dtype=np.float64).sum(axis=0)
                energy_C += of_block_C
                # The mean of uncorrelated channels has at least 1 / C of the largest amplitude; the limit is 6 dB less.
                if np.square(mono_S, dtype=np.float64).sum() < 0.25 * of_block_C.max() / C**2:
                    cancelled += of_block_C.max()
            parts.append(resampler.resample_chunk(mono_S) if resampler else mono_S)
            if is_cut:
                break
        if resampler:
            parts.append(resampler.resample_chunk(np.empty(0, np.float32), last=True))
    if not is_cut and (fault := "breaks off" if num_read < (num_samples or 0) else _fault_at_end(stream)):
        raise AudioError(fault, f"'{name}' {FAULTS[fault]}")
    if cancelled > MAX_CANCELLED * energy_C.max():
        return _read(stream, name, wanted_hz, start_s, max_s, int(energy_C.argmax()))
    samples_S = np.concatenate([*parts, np.empty(0, np.float32)])
    samples_S = samples_S if max_s is None else samples_S[: round(max_s * wanted_hz)]
    if not len(samples_S) and start_s:
        problem = f"'{name}' starts at {start_s:g} s, after the end of the file"
        raise AudioError("past the end", f"{problem}; correct its offset in the manifest")
    if not len(samples_S):
        raise AudioError("empty", f"'{name}' contains 0 audio samples; choose another clip")
    return Waveform(torch.from_numpy(samples_S), wanted_hz, is_cut, () if channel is None else (OPPOSITE,))


def _check_samples(block_SC: np.ndarray, name: str) -> None:
    peak = float(np.abs(block_SC).max(initial=0.0))
    if not math.isfinite(peak):
        raise AudioError("non-finite", f"'{name}' has NaN or infinite samples; replace them, or remove the file")
    if peak > MAX_PEAK:
        problem = f"'{name}' has samples up to {peak:,.0f}, outside [-1, 1]"
        raise AudioError("out of range", f"{problem}; scale the samples of this file to [-1, 1]")


@contextmanager
def _opened(stream: BinaryIO, start_seconds: float = 0.0) -> Iterator[Recording]:
    """Open the bytes of a file, or an unbuffered file; the audio blocks begin at ``start_seconds``.

    For damaged files, decoders raise many types of errors, both when the file is opened and while blocks are read.
    An ImportError means that the file can be read only with PyAV, and that PyAV is not installed.
    """
    stream.seek(0)
    head = stream.read(16)
    stream.seek(0)
    for form, pattern in FFMPEG_FORMATS.items():
        if re.match(pattern, head, re.DOTALL):
            import av

            with closing(av.open(stream, format=form, options={"protocol_whitelist": ""})) as container:
                yield _ffmpeg_recording(container, start_seconds)
            return
    # libsndfile reads a file by its descriptor, and bytes through Python.
    with _Forward(stream if isinstance(stream, BytesIO) else stream.fileno(), closefd=False) as file:
        if file.format != "MP3":
            yield _recording(file, start_seconds)
            return
    # If an MP3 has no Xing frame, its length is a guess. libsndfile reads past the guess only if it cannot seek.
    with _piped(stream) as source, _Forward(source, closefd=False) as file:
        yield _recording(file, start_seconds)


def _fault_at_end(stream: BinaryIO) -> str | None:
    """If the file has a fault that libsndfile does not report, return its key in `FAULTS`, else None."""
    size = stream.seek(0, SEEK_END)
    stream.seek(0)
    head = stream.read(12)
    if head.startswith(b"RIFF") and head.endswith(b"WAVE"):
        return _chunk_fault(stream, size, "little", b"data")
    if head.startswith(b"FORM") and head[8:11] == b"AIF":
        return _chunk_fault(stream, size, "big", b"SSND")
    return _page_fault(stream, size) if head.startswith(b"OggS") else None


def _chunk_fault(stream: BinaryIO, size: int, order: Literal["little", "big"], samples: bytes) -> str | None:
    offset = 12
    while len(head := stream.read(8)) == 8:
        length = int.from_bytes(head[4:], order)
        offset += 8 + length
        if head.startswith(samples):
            return "breaks off" if length < UNKNOWN_SIZE and offset > size + MISCOUNTED_BYTES else None
        offset += length % 2
        stream.seek(offset)
    return None


def _page_fault(stream: BinaryIO, size: int) -> str | None:
    """Return a key of `FAULTS` if an Ogg page is incomplete or a stream begins after others (RFC 3533, section 6)."""
    offset, has_begun = 0, False
    while offset <= size:
        stream.seek(offset)
        header = stream.read(27)
        if len(header) < 27 or not header.startswith(b"OggS"):
            return "breaks off" if b"OggS" in header + stream.read() else None
        is_first = bool(header[5] & 2)
        if is_first and has_begun:
            return "chained Ogg"
        has_begun |= not is_first  # all streams of one Ogg file begin at its start
        offset += 27 + header[26] + sum(stream.read(header[26]))
    return "breaks off"


class _Forward(soundfile.SoundFile):
    """File that is read without seeking. soundfile seeks after each block, but pipes and some codecs cannot seek."""

    def seekable(self) -> bool:
        return False


@contextmanager
def _piped(stream: BinaryIO) -> Iterator[int]:
    """Yield the descriptor of a pipe that delivers the bytes of ``stream``."""
    stream.seek(0)
    reader, writer = os.pipe()

    def feed() -> None:
        with suppress(BrokenPipeError), open(writer, "wb") as file:  # raised if the reader stops early
            shutil.copyfileobj(stream, file)

    with ThreadPoolExecutor(1) as pool:
        fed = pool.submit(feed)
        try:
            yield reader
        finally:
            os.close(reader)
            fed.result()


def _recording(file: soundfile.SoundFile, start_seconds: float) -> Recording:
    first = round(start_seconds * file.samplerate)
    is_exact = file.frames != UNKNOWN_LENGTH and not file.subtype.startswith("MPEG")
    length = max(file.frames - first, 0) if is_exact else None
    if length and first and file.format in SEEKABLE and file.subtype.startswith(UNCODED):
        file.seek(first)
        return file.samplerate, file.channels, length, _blocks(file, length)
    return file.samplerate, file.channels, length, _without(first, _blocks(file, file.frames if is_exact else None))


def _blocks(file: soundfile.SoundFile, length: int | None) -> Iterator[np.ndarray]:
    """Yield blocks, in total up to ``length`` samples per channel. A valid FLAC file may have data after the audio."""
    at_once, left = max(1, BLOCK_SAMPLES // file.channels), float("inf") if length is None else length
    while left and len(block_SC := file.read(int(min(at_once, left)), "float32", always_2d=True)):
        left -= len(block_SC)
        yield block_SC


def _without(first: int, blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the audio of the blocks without its first samples; ``first``: number of samples to drop."""
    for block_SC in blocks:
        if len(block_SC) > first:
            yield block_SC[first:]
        first = max(first - len(block_SC), 0)


def _ffmpeg_recording(container: Any, start_seconds: float) -> Recording:
    import av

    if not container.streams.audio:
        raise ValueError("it does not contain an audio stream")
    stream = container.streams.audio[0]
    frames = container.decode(stream)
    first = next(frames, None)  # the header may have another sample rate (HE-AAC)
    if first is None:
        raise ValueError("its audio cannot be decoded")
    C, rate_hz = first.layout.nb_channels, first.sample_rate
    to_float = av.AudioResampler(format="flt")  # interleaved, with the same rate and channels

    def blocks() -> Iterator[np.ndarray]:
        for frame in chain([first], frames):
            if (frame.layout.nb_channels, frame.sample_rate) != (C, rate_hz):  # PyAV 18.1 would read out of bounds
                raise ValueError("its channels or sample rate change within the file")
            for part in to_float.resample(frame):
                if part.samples:
                    yield part.to_ndarray().reshape(-1, C)

    return rate_hz, C, None, _without(round(start_seconds * rate_hz), blocks())
