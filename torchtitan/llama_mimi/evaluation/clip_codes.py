"""Codes of benchmark clips, kept on disk so that a second model or preset does not encode them again.

A cache is a folder of Parquet shards as tokenised corpora have them, each written whole; ``id`` is the SHA-256 of the
audio file. Everything that codes depend on is in the name of the folder, so that nothing is ever mistaken.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from tqdm import tqdm

from llama_mimi.audio.mimi import MimiCodec, codec_hash
from llama_mimi.audio.reading import AudioError, Waveform, read_audio
from llama_mimi.common.errors import UserError
from llama_mimi.common.files import find_files, write_atomically
from llama_mimi.common.ranks import Ranks, gather
from llama_mimi.common.versions import versions
from llama_mimi.data.code_store import StoredClip, read_codes, shard_bytes
from llama_mimi.evaluation.benchmarks import BenchmarkClip

# Levels that are kept where the codec has them: models of fewer take a prefix.
STORED_LEVELS = 8
# Clips that are read ahead, sorted by length, encoded and written together; a kill loses at most these.
CLIPS_PER_CHUNK = 64
READERS = 4  # threads that read and resample
# To be raised when reading, resampling, cutting or encoding changes in this project, so that codes kept before are not
# used.
ENCODING = 2


@dataclass(frozen=True)
class CachedCodes:
    """Codes of one clip: uint16 codes_TQ, and whether the recording went on after the cut."""

    codes_TQ: np.ndarray
    is_cut: bool


class CodeCache:
    """Codes by the SHA-256 of their audio.

    Args:
        folder: of all caches, local or on any fsspec path.
        key: what codes depend on, as `cache_key` says.
    """

    def __init__(self, folder: str, key: dict[str, Any]) -> None:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = f"{folder.rstrip('/')}/{digest}"
        self._key = key

    def load(self) -> dict[str, CachedCodes]:
        """All that is there.

        Raises:
            UserError: a shard is damaged.
        """
        found: dict[str, CachedCodes] = {}
        for path in find_files(self.folder, (".parquet",)):
            try:
                shard = read_codes(path, ["id", "codes", "is_cut"], self._key["levels"])
            except UserError as error:
                raise UserError(f"the kept codes are damaged ({error}); delete that file, it is made again") from error
            for row, (audio_id, is_cut) in enumerate(zip(shard.columns["id"], shard.columns["is_cut"], strict=True)):
                found[audio_id] = CachedCodes(shard.codes(row), is_cut)
        return found

    def add(self, codes: dict[str, CachedCodes], frame_rate_hz: float) -> None:
        """Write codes by the hash of their audio as one shard.

        Raises:
            UserError: the file system is full or refuses.
        """
        stored = [
            StoredClip(audio_id, some.codes_TQ, len(some.codes_TQ) / frame_rate_hz, some.is_cut)
            for audio_id, some in codes.items()
        ]
        if stored:
            content = shard_bytes(stored, self._key["levels"], {"columns": [], **self._key})
            write_atomically(self.folder, f"shard-{uuid4().hex}.parquet", content)


def cache_key(codec: MimiCodec, max_seconds: float, *, as_released: bool) -> dict[str, Any]:
    """Everything that codes of a clip depend on, given what `encode_clips` takes."""
    return {
        "encoding": ENCODING,
        "codec_sha256": codec_hash(codec.name),
        "attention": codec.attention,
        "levels": _stored_levels(codec),
        "dtype": str(codec.dtype),
        "device": codec.device.type,
        "max_audio_seconds": max_seconds,
        "partial_frame": "as released" if as_released else "zeros",
        "versions": {package: number for package, number in versions().items() if package != "commit"},
    }


def encode_clips(
    codec: MimiCodec,
    clips: Sequence[BenchmarkClip],
    cache: CodeCache,
    ranks: Ranks,
    max_seconds: float,
    *,
    as_released: bool = False,
) -> tuple[list[str], dict[str, CachedCodes]]:
    """Codes of all clips, from the cache or encoded now, a part by each rank.

    Args:
        codec: whose levels are returned; up to `STORED_LEVELS` are kept.
        clips: to encode.
        cache: taken from and added to.
        ranks: that share the work.
        max_seconds: longer clips are cut.
        as_released: leave a partial last frame to the codec, as the first release does, one clip at a time.

    Returns:
        For each clip the SHA-256 of its audio, and codes by that.

    Raises:
        AudioError: a clip cannot be used. None is ever left out.
        UserError: the cache is damaged or cannot be written.
    """
    known = cache.load()
    deep = codec.at_depth(_stored_levels(codec))
    mine = clips[ranks.rank :: ranks.world_size]
    audio_ids: list[str] = []
    with tqdm(total=len(mine), unit="clip", desc="codes", disable=ranks.rank > 0) as progress:
        for chunk in _read_ahead(mine, partial(_read, codec=deep, max_seconds=max_seconds, known=known)):
            new = {
                audio_id: waveform
                for audio_id, waveform in chunk
                if waveform is not None and audio_id not in known  # the chunk before may have had it
            }
            samples = [waveform.samples_S for waveform in new.values()]
            codes = list(map(deep.encode_as_released, samples)) if as_released else deep.encode_many(samples)
            encoded = {
                audio_id: CachedCodes(codes_TQ.numpy().astype(np.uint16), waveform.is_cut)
                for (audio_id, waveform), codes_TQ in zip(new.items(), codes, strict=True)
            }
            cache.add(encoded, codec.frame_rate_hz)
            known |= encoded
            audio_ids += [audio_id for audio_id, _ in chunk]
            progress.update(len(chunk))
    all_ids = [""] * len(clips)
    everything: dict[str, CachedCodes] = {}
    mine_by_id = {audio_id: known[audio_id] for audio_id in audio_ids}
    for rank, (some_ids, some_codes) in enumerate(gather((audio_ids, mine_by_id))):
        all_ids[rank :: ranks.world_size] = some_ids
        everything |= some_codes
    Q = codec.num_quantizers
    return all_ids, {audio_id: CachedCodes(some.codes_TQ[:, :Q], some.is_cut) for audio_id, some in everything.items()}


def _stored_levels(codec: MimiCodec) -> int:
    return max(codec.num_quantizers, min(STORED_LEVELS, codec.config.num_quantizers))


def _read_ahead(
    clips: Sequence[BenchmarkClip], read: Callable[[BenchmarkClip], tuple[str, Waveform | None]]
) -> Iterator[list[tuple[str, Waveform | None]]]:
    """Clips in chunks, each read by threads while the one before is used."""
    chunks = [clips[start : start + CLIPS_PER_CHUNK] for start in range(0, len(clips), CLIPS_PER_CHUNK)]
    pool = ThreadPoolExecutor(READERS)
    try:
        ahead: list[Future[tuple[str, Waveform | None]]] = []
        for chunk in [*chunks, []]:
            current, ahead = ahead, [pool.submit(read, clip) for clip in chunk]
            if current:
                yield [future.result() for future in current]
    finally:
        pool.shutdown(cancel_futures=True)


def _read(
    clip: BenchmarkClip, *, codec: MimiCodec, max_seconds: float, known: Mapping[str, CachedCodes]
) -> tuple[str, Waveform | None]:
    """The SHA-256 of a clip's file, and its samples where they are needed."""
    content = clip.read()
    audio_id = hashlib.sha256(content).hexdigest()
    if audio_id in known:
        return audio_id, None
    name = str(clip.source) if isinstance(clip.source, Path) else clip.name
    waveform = read_audio(
        content, codec.sample_rate_hz, max_seconds=max_seconds, name=name, min_samples=codec.frame_size
    )
    if waveform.remarks:  # half a clip, or one channel, has another score
        raise AudioError("damaged", f"'{name}' is {waveform.remarks[0]}; mend it or copy it anew")
    return audio_id, waveform
