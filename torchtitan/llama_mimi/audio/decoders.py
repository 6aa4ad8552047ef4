"""Decode audio files to blocks of samples as they were recorded, by libsndfile, or by FFmpeg (PyAV)."""

import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from io import SEEK_END, BytesIO
from itertools import chain
from typing import Any, BinaryIO, Literal

import numpy as np
import soundfile

# Samples of all channels that are decoded at once, 0.25 MB in float32: memory does not depend on the file.
BLOCK_SAMPLES = 2**16
# libsndfile's length of a file written through a pipe: the largest 64-bit integer.
UNKNOWN_LENGTH = 2**63 - 1
# libsndfile seeks to the exact sample in these encodings of these formats.
UNCODED = ("PCM", "FLOAT", "DOUBLE", "ULAW", "ALAW")
SEEKABLE = ("WAV", "WAVEX", "AIFF", "FLAC", "W64", "RF64")
# FFmpeg's formats that libsndfile does not read (MP4, WebM, AAC, WMA), by the first bytes of a file. FFmpeg tries no
# other: some of its formats are lists of addresses, and bytes that claim to be audio must not cause a download.
FFMPEG_FORMATS = {
    "mov": rb".{4}ftyp",
    "matroska": rb"\x1aE\xdf\xa3",
    "aac": rb"\xff[\xf0\xf1\xf8\xf9]",  # ADTS: layer 0, which no MP3 frame has
    "asf": rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11\xa6\xd9\x00\xaa\x00\x62\xce\x6c",
}
# Bytes that a whole WAV or AIFF file may lack of the size in its header: some programs count the header, too.
MISCOUNTED_BYTES = 256
# Sizes from here on mean that the size was not known when the header was written.
UNKNOWN_SIZE = 0x7FFF_F000
# Sample rate in Hz, C, samples per channel by the header (None where it gives none, or an estimate), and blocks (S, C).
Recording = tuple[int, int, int | None, Iterator[np.ndarray]]


@contextmanager
def opened(stream: BinaryIO, start_seconds: float = 0.0) -> Iterator[Recording]:
    """Open bytes, or a file without a buffer, for decoding from ``start_seconds`` on.

    Raises:
        ImportError: only FFmpeg reads the file, and PyAV is not installed.
        Exception: decoders raise various errors for damaged files, here and while blocks are read.
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
    # libsndfile itself reads from a file on disk; bytes are read through Python.
    with _Forward(stream if isinstance(stream, BytesIO) else stream.fileno(), closefd=False) as file:
        if file.format != "MP3":
            yield _recording(file, start_seconds)
            return
    # Without a Xing frame the length of an MP3 is a guess, at which libsndfile ends, unless it cannot seek.
    with _piped(stream) as source, _Forward(source, closefd=False) as file:
        yield _recording(file, start_seconds)


def fault_at_end(stream: BinaryIO) -> str | None:
    """Return "breaks off" (WAV, AIFF, Ogg) or "chained Ogg" where it applies; libsndfile does not report them."""
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
    """A chain is Ogg files one after another, each with a first page that says so (RFC 3533, section 6)."""
    offset, has_begun = 0, False
    while offset <= size:
        stream.seek(offset)
        header = stream.read(27)
        if len(header) < 27 or not header.startswith(b"OggS"):
            return "breaks off" if b"OggS" in header + stream.read() else None
        is_first = bool(header[5] & 2)
        if is_first and has_begun:
            return "chained Ogg"
        has_begun |= not is_first  # multiplexed streams all begin at the start
        offset += 27 + header[26] + sum(stream.read(header[26]))
    return "breaks off"


class _Forward(soundfile.SoundFile):
    """A file read from beginning to end. soundfile seeks after each block, which pipes and some encodings forbid."""

    def seekable(self) -> bool:
        return False


@contextmanager
def _piped(stream: BinaryIO) -> Iterator[int]:
    """A file descriptor from which the bytes of ``stream`` are read, and which cannot seek."""
    stream.seek(0)
    reader, writer = os.pipe()

    def feed() -> None:
        with suppress(BrokenPipeError), open(writer, "wb") as file:  # the reader may stop early
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
    """Blocks of up to ``length`` samples per channel: other data may follow the last frame of a sound FLAC file."""
    at_once, left = max(1, BLOCK_SAMPLES // file.channels), float("inf") if length is None else length
    while left and len(block_SC := file.read(int(min(at_once, left)), "float32", always_2d=True)):
        left -= len(block_SC)
        yield block_SC


def _without(first: int, blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Drop the first samples."""
    for block_SC in blocks:
        if len(block_SC) > first:
            yield block_SC[first:]
        first = max(first - len(block_SC), 0)


def _ffmpeg_recording(container: Any, start_seconds: float) -> Recording:
    import av

    if not container.streams.audio:
        raise ValueError("it has no audio stream")
    stream = container.streams.audio[0]
    frames = container.decode(stream)
    first = next(frames, None)  # decoded audio may have another rate than the header says (HE-AAC)
    if first is None:
        raise ValueError("nothing of it can be decoded")
    C, rate_hz = first.layout.nb_channels, first.sample_rate
    to_float = av.AudioResampler(format="flt")  # interleaved; rate and channels stay

    def blocks() -> Iterator[np.ndarray]:
        for frame in chain([first], frames):
            if (frame.layout.nb_channels, frame.sample_rate) != (C, rate_hz):  # PyAV 18.1 then reads foreign memory
                raise ValueError("its channels or its sample rate change within the file")
            for part in to_float.resample(frame):
                if part.samples:
                    yield part.to_ndarray().reshape(-1, C)

    return rate_hz, C, None, _without(round(start_seconds * rate_hz), blocks())
