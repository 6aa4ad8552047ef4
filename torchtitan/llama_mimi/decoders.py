"""Files of any kind -> blocks of samples as they were recorded: libsndfile's formats, and some of FFmpeg's with PyAV.

Nothing that a header says is relied on: lengths may be unknown or wrong, so files are read in blocks to their end.
"""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import chain
from typing import Any, BinaryIO

import numpy as np
import soundfile

# Samples of all channels that are decoded at once, 0.25 MB in float32: memory does not depend on the file.
BLOCK_SAMPLES = 2**16
# What libsndfile calls the length of a file written through a pipe: the largest 64-bit integer.
UNKNOWN_LENGTH = 2**63 - 1
# How files begin that FFmpeg reads and libsndfile does not, and FFmpeg's name of their format. No other is tried: some
# of FFmpeg's formats are lists of addresses, and bytes that claim to be audio must not make anybody fetch them.
FFMPEG_FORMATS = {"MP4 or M4A": "mov", "WebM or Matroska": "matroska", "AAC": "aac", "WMA": "asf"}
HEAD_BYTES = 16


class NeedsFFmpeg(Exception):
    """A file that only FFmpeg reads, where PyAV is not installed; the message names its format."""


@dataclass(frozen=True)
class Recording:
    """Samples of one recording of a file.

    Args:
        rate_hz: sample rate.
        num_channels: C.
        num_samples: of a channel, as the header says; None where it does not.
        blocks: of shape (S, C) in float32, none empty.
    """

    rate_hz: int
    num_channels: int
    num_samples: int | None
    blocks: Iterator[np.ndarray]


@contextmanager
def opened(stream: BinaryIO, offset: int = 0) -> Iterator[Recording]:
    """The recording that begins at ``offset``.

    Args:
        stream: bytes, or a file that was opened without a buffer.
        offset: 0, or what `next_link` returned.

    Raises:
        NeedsFFmpeg: see there.
        Exception: what the decoders raise when a file is damaged or is no audio, here and while blocks are read.
    """
    stream.seek(offset)
    kind = _ffmpeg_format(stream.read(HEAD_BYTES))
    stream.seek(offset)
    if kind is not None:
        with closing(_open_ffmpeg(stream, kind)) as container:
            yield _ffmpeg_recording(container)
        return
    # libsndfile itself reads from a file on disk; whatever else it is, it is read through Python.
    source: Any = BytesIO(stream.read()) if offset else stream
    if not isinstance(source, BytesIO):
        source = stream.fileno()
    with _Forward(source, closefd=False) as file:
        length = None if file.frames == UNKNOWN_LENGTH else file.frames
        yield Recording(file.samplerate, file.channels, length, _blocks(file))


def next_link(stream: BinaryIO, offset: int) -> int | None:
    """Where the next recording of a chained Ogg file begins, or None; libsndfile reads the first and stops.

    A chain is Ogg files one behind the other, each with a first page that says so (RFC 3533, section 6).

    Args:
        stream: a file or bytes.
        offset: where the recording begins that was read.
    """
    is_begun = False
    while True:
        stream.seek(offset)
        header = stream.read(27)
        if len(header) < 27 or not header.startswith(b"OggS"):
            return None
        is_first = bool(header[5] & 2)
        if is_first and is_begun:
            return offset
        is_begun |= not is_first  # streams beside each other all begin at the start
        offset += 27 + header[26] + sum(stream.read(header[26]))


class _Forward(soundfile.SoundFile):
    """Read from beginning to end. soundfile seeks after each block, which damaged and piped files do not survive."""

    def seekable(self) -> bool:
        return False


def _blocks(file: soundfile.SoundFile) -> Iterator[np.ndarray]:
    num_samples = max(1, BLOCK_SAMPLES // file.channels)
    while len(block_SC := file.read(num_samples, dtype="float32", always_2d=True)):
        yield block_SC


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
