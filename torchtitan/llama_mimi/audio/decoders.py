"""Files of any kind -> blocks of samples as they were recorded: libsndfile's formats, and some of FFmpeg's with PyAV.

Lengths in headers may be unknown or too large, and files end early: they are read in blocks as far as they go. One that
a FLAC or WAV header puts too small, or the Xing frame of an MP3, is believed, as libsndfile ends there.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from io import SEEK_END, BytesIO
from itertools import chain
from typing import Any, BinaryIO, Literal

import numpy as np
import soundfile

# Samples of all channels that are decoded at once, 0.25 MB in float32: memory does not depend on the file.
BLOCK_SAMPLES = 2**16
# What libsndfile calls the length of a file written through a pipe: the largest 64-bit integer.
UNKNOWN_LENGTH = 2**63 - 1
# What libsndfile can enter anywhere, to the sample. Ogg is counted in time there, which a lost page makes another.
UNCODED = ("PCM", "FLOAT", "DOUBLE", "ULAW", "ALAW")
SEEKABLE = ("WAV", "WAVEX", "AIFF", "FLAC", "W64", "RF64")
# How files begin that FFmpeg reads and libsndfile does not, and FFmpeg's name of their format. No other is tried: some
# of FFmpeg's formats are lists of addresses, and bytes that claim to be audio must not make anybody fetch them.
FFMPEG_FORMATS = {"MP4 or M4A": "mov", "WebM or Matroska": "matroska", "AAC": "aac", "WMA": "asf"}
HEAD_BYTES = 16
# A WAV or AIFF file may miss so many bytes of what its header says and be whole: some programs count the header, too.
MISCOUNTED_BYTES = 256
# Sizes from here on mean that the size was not known when the header was written.
UNKNOWN_SIZE = 0x7FFF_F000


class NeedsFFmpeg(Exception):
    """A file that only FFmpeg reads, where PyAV is not installed; the message names its format."""


@dataclass(frozen=True)
class Recording:
    """Samples of one recording of a file.

    Args:
        rate_hz: sample rate.
        num_channels: C.
        num_samples: of each channel by the header; None where it gives none, or only an estimate.
        blocks: of shape (S, C) in float32, none empty.
    """

    rate_hz: int
    num_channels: int
    num_samples: int | None
    blocks: Iterator[np.ndarray]


@dataclass(frozen=True)
class OggLink:
    """One of the recordings that a chained Ogg file holds, one behind the other.

    Args:
        start, end: where its bytes lie.
        is_whole: its last page is complete, and only the next recording, if any, follows.
    """

    start: int
    end: int
    is_whole: bool


@contextmanager
def opened(stream: BinaryIO, link: OggLink | None = None, start_seconds: float = 0.0) -> Iterator[Recording]:
    """A recording in a file.

    Args:
        stream: bytes, or a file that was opened without a buffer.
        link: recording of a chained Ogg file to open; None opens the first, which in other files is the only one.
        start_seconds: blocks begin there; what comes before is not decoded in formats of `SEEKABLE`.

    Raises:
        NeedsFFmpeg: see there.
        Exception: what the decoders raise when a file is damaged or is no audio, here and while blocks are read.
    """
    if link is not None:
        stream.seek(link.start)
        stream = BytesIO(stream.read(link.end - link.start))
    stream.seek(0)
    kind = _ffmpeg_format(stream.read(HEAD_BYTES))
    stream.seek(0)
    if kind is not None:
        with closing(_open_ffmpeg(stream, kind)) as container:
            yield _from(_ffmpeg_recording(container), start_seconds)
        return
    # libsndfile itself reads from a file on disk; bytes are read through Python.
    with _Forward(stream if isinstance(stream, BytesIO) else stream.fileno(), closefd=False) as file:
        if start_seconds and file.format in SEEKABLE and file.subtype.startswith(UNCODED):
            yield _recording(file, round(start_seconds * file.samplerate))
            return
        if file.format != "MP3":
            yield _from(_recording(file), start_seconds)
            return
    # Without a Xing frame the length of an MP3 is a guess, at which libsndfile ends, unless it cannot seek.
    with _piped(stream) as source, _Forward(source, closefd=False) as file:
        yield _from(_recording(file), start_seconds)


def ogg_links(stream: BinaryIO) -> Iterator[OggLink]:
    """The recordings of a chained Ogg file in order; of other files none.

    A chain is Ogg files one behind the other, each with a first page that says so (RFC 3533, section 6). libsndfile
    reads the first and stops.
    """
    size = stream.seek(0, SEEK_END)
    start = offset = 0
    is_begun = False
    while True:
        stream.seek(offset)
        header = stream.read(27)
        if len(header) < 27 or not header.startswith(b"OggS"):
            if offset:
                stream.seek(offset)
                yield OggLink(start, offset, b"OggS" not in stream.read())
            return
        num_bytes = 27 + header[26] + sum(stream.read(header[26]))
        is_first = bool(header[5] & 2)
        if is_first and is_begun:
            yield OggLink(start, offset, True)
            start, is_begun = offset, False
        is_begun |= not is_first  # streams beside each other all begin at the start
        offset += num_bytes
        if offset > size:
            yield OggLink(start, size, False)
            return


def breaks_off(stream: BinaryIO) -> bool:
    """Whether a WAV or AIFF file ends before the samples that its header says; libsndfile does not tell."""
    size = stream.seek(0, SEEK_END)
    stream.seek(0)
    order: Literal["little", "big"]
    match stream.read(12):
        case head if head.startswith(b"RIFF") and head.endswith(b"WAVE"):
            order, samples = "little", b"data"
        case head if head.startswith(b"FORM") and head[8:11] == b"AIF":
            order, samples = "big", b"SSND"
        case _:
            return False
    offset = 12
    while len(head := stream.read(8)) == 8:
        length = int.from_bytes(head[4:], order)
        offset += 8 + length
        if head.startswith(samples):
            return length < UNKNOWN_SIZE and offset > size + MISCOUNTED_BYTES
        offset += length % 2
        stream.seek(offset)
    return False


class _Forward(soundfile.SoundFile):
    """Read from beginning to end. soundfile seeks after each block, which damaged and piped files do not survive."""

    def seekable(self) -> bool:
        return False


@contextmanager
def _piped(stream: BinaryIO) -> Iterator[int]:
    """A file descriptor from which the bytes of ``stream`` are read, and which cannot seek.

    Raises:
        OSError: the file could not be read to its end.
    """
    stream.seek(0)
    reader, writer = os.pipe()
    failed: list[OSError] = []

    def feed() -> None:
        with open(writer, "wb", buffering=0) as file:
            try:
                while some := stream.read(2**16):
                    view = memoryview(some)
                    while view:
                        view = view[file.write(view) :]
            except BrokenPipeError:
                pass  # the rest is not wanted
            except OSError as error:
                failed.append(error)

    thread = threading.Thread(target=feed, daemon=True)
    thread.start()
    try:
        yield reader
    finally:
        os.close(reader)
        thread.join()
    if failed:
        raise failed[0]


def _recording(file: soundfile.SoundFile, first: int = 0) -> Recording:
    """From sample ``first`` on."""
    is_exact = file.frames != UNKNOWN_LENGTH and not file.subtype.startswith("MPEG")
    length = max(file.frames - first, 0) if is_exact else None
    if first and length != 0:
        file.seek(first)
    return Recording(file.samplerate, file.channels, length, _blocks(file, length, first))


def _from(recording: Recording, start_seconds: float) -> Recording:
    """A recording without its beginning, which is decoded."""
    first = round(start_seconds * recording.rate_hz)
    if not first:
        return recording

    def blocks() -> Iterator[np.ndarray]:
        num_read = 0
        for block_SC in recording.blocks:
            num_read += len(block_SC)
            if num_read > first:
                yield block_SC[-min(len(block_SC), num_read - first) :]

    length = None if recording.num_samples is None else max(recording.num_samples - first, 0)
    return replace(recording, num_samples=length, blocks=blocks())


def _blocks(file: soundfile.SoundFile, length: int | None, first: int) -> Iterator[np.ndarray]:
    """Blocks to the end; where decoding fails, what was decoded before comes first."""
    num_read = 0
    while length is None or num_read < length:  # behind the last frame of a sound FLAC file there may be something else
        wanted = max(1, BLOCK_SAMPLES // file.channels)
        block_SC = np.empty((wanted if length is None else min(wanted, length - num_read), file.channels), np.float32)
        try:
            num_new = len(file.read(out=block_SC))
        except soundfile.SoundFileError:
            if num_new := file.tell() - first - num_read:
                yield block_SC[:num_new]
            raise
        if num_new == 0:
            return
        num_read += num_new
        yield block_SC[:num_new]


def _ffmpeg_format(head: bytes) -> str | None:
    """The kind of file that begins so, if only FFmpeg reads it."""
    if head[4:8] == b"ftyp":
        return "MP4 or M4A"
    if head.startswith(b"\x1aE\xdf\xa3"):
        return "WebM or Matroska"
    if head[:1] == b"\xff" and head[1:2] and head[1] & 0xF6 == 0xF0:  # ADTS: layer 0, which no MP3 frame has
        return "AAC"
    if head.startswith(bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")):
        return "WMA"
    return None


def _open_ffmpeg(stream: BinaryIO, kind: str) -> Any:
    try:
        import av
    except ImportError as error:
        raise NeedsFFmpeg(kind) from error
    return av.open(stream, format=FFMPEG_FORMATS[kind], options={"protocol_whitelist": ""})


def _ffmpeg_recording(container: Any) -> Recording:
    import av

    if not container.streams.audio:
        raise ValueError("it has no audio stream")
    stream = container.streams.audio[0]
    frames = container.decode(stream)
    first = next(frames, None)  # what is decoded may have another rate than the header says (HE-AAC)
    if first is None:
        raise ValueError("nothing of it can be decoded")
    C, rate_hz = first.layout.nb_channels, first.sample_rate
    to_float = av.AudioResampler(format="flt")  # interleaved; rate and channels stay

    def blocks() -> Iterator[np.ndarray]:
        for frame in chain([first], frames):
            if (frame.layout.nb_channels, frame.sample_rate) != (C, rate_hz):  # PyAV 18.1 then reads foreign memory
                raise ValueError("its channels or its sample rate change on the way")
            for part in to_float.resample(frame):
                if part.samples:
                    yield part.to_ndarray().reshape(-1, C)

    return Recording(rate_hz, C, None, blocks())
