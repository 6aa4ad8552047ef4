"""Codes of benchmark clips, cached on disk so that a second model or preset does not encode them again.

The cache is a folder of Parquet shards as in tokenised corpora; ``id`` is the SHA-256 of the audio file. The folder is
named by the hash of everything else that the codes depend on.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import numpy as np
from tqdm import tqdm

from llama_mimi.audio.mimi import MimiCodec, codec_hash
from llama_mimi.audio.reading import AudioError, Waveform, read_audio
from llama_mimi.common.batching import prefetch_map
from llama_mimi.common.distributed import DistributedContext, gather
from llama_mimi.common.files import find_files, write_atomically
from llama_mimi.common.versions import versions
from llama_mimi.data.code_store import CodedClip, read_codes, shard_bytes
from llama_mimi.evaluation.benchmarks import Clip

STORED_LEVELS = 8  # levels cached if the codec has them; models with fewer levels use a prefix
CLIPS_PER_CHUNK = 64  # clips read ahead, encoded and written together; a kill loses one chunk
READERS = 4  # threads that read and resample
ENCODING = 2  # raise it when this project changes how clips are read, resampled, cut or encoded


@dataclass(frozen=True)
class ClipCodes:
    """Codes of one clip."""

    codes_TQ: np.ndarray  # uint16
    is_cut: bool  # the recording was longer than the limit


def encode_clips(
    codec: MimiCodec,
    clips: Sequence[Clip],
    codes_dir: str,
    ranks: DistributedContext,
    max_seconds: float,
    *,
    as_released: bool = False,
) -> tuple[list[str], dict[str, ClipCodes]]:
    """Return the SHA-256 of the audio of each clip, and codes by that, from the cache or encoded now.

    Args:
        codes_dir: folder of caches, local or on any fsspec path.
        max_seconds: maximum length of a clip; longer ones are cut.
        as_released: leave a partial last frame to the codec, as the first release does, one clip at a time.

    Raises:
        AudioError: a clip cannot be used; none is ever left out.
        UserError: the cache is damaged or cannot be written.
    """
    deep = codec.at_depth(max(codec.num_quantizers, min(STORED_LEVELS, codec.config.num_quantizers)))
    settings = {
        "encoding": ENCODING,
        "codec_sha256": codec_hash(deep.name),
        "sliding_window": deep.sliding_window,
        "levels": deep.num_quantizers,
        "dtype": str(deep.dtype),
        "device": deep.device.type,
        "max_audio_seconds": max_seconds,
        "partial_frame": "as released" if as_released else "zeros",
        "versions": versions() | {"commit": ""},
    }
    name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    folder = f"{codes_dir.rstrip('/')}/{name}"
    known: dict[str, ClipCodes] = {}
    for path in find_files(folder, (".parquet",)):
        shard = read_codes(path, ["id", "codes", "is_cut"], deep.num_quantizers)
        for row, (audio_id, is_cut) in enumerate(zip(shard.columns["id"], shard.columns["is_cut"], strict=True)):
            known[audio_id] = ClipCodes(shard.codes(row), is_cut)

    def read(clip: Clip) -> tuple[str, Waveform | None]:
        return _read(clip, deep, max_seconds, known)

    mine = clips[ranks.rank :: ranks.world_size]
    chunks = [mine[start : start + CLIPS_PER_CHUNK] for start in range(0, len(mine), CLIPS_PER_CHUNK)]
    audio_ids: list[str] = []
    with ThreadPoolExecutor(READERS) as pool:
        ahead = prefetch_map(lambda chunk: list(pool.map(read, chunk)), chunks, num_ahead=1)
        for chunk in tqdm(ahead, total=len(chunks), desc="codes", unit="chunk", disable=ranks.rank > 0):
            audio_ids += [audio_id for audio_id, _ in chunk]
            # The chunk before may contain a clip that was not known when it was read.
            new = {audio_id: one for audio_id, one in chunk if one is not None and audio_id not in known}
            if not new:
                continue
            samples = [waveform.samples_S for waveform in new.values()]
            codes = list(map(deep.encode_as_released, samples)) if as_released else deep.encode_many(samples)
            stored = []
            for (audio_id, waveform), codes_TQ in zip(new.items(), codes, strict=True):
                known[audio_id] = clip = ClipCodes(codes_TQ.numpy().astype(np.uint16), waveform.is_cut)
                seconds = len(clip.codes_TQ) / codec.frame_rate_hz
                stored.append(CodedClip(audio_id, clip.codes_TQ, seconds, clip.is_cut))
            content = shard_bytes(stored, deep.num_quantizers, {"columns": [], **settings})
            write_atomically(folder, f"shard-{uuid4().hex}.parquet", content)
    Q = codec.num_quantizers
    my_codes = {audio_id: ClipCodes(known[audio_id].codes_TQ[:, :Q], known[audio_id].is_cut) for audio_id in audio_ids}
    all_ids = [""] * len(clips)
    all_codes: dict[str, ClipCodes] = {}
    for rank, (some_ids, some_codes) in enumerate(gather((audio_ids, my_codes))):
        all_ids[rank :: ranks.world_size] = some_ids
        all_codes |= some_codes
    return all_ids, all_codes


def codes_sha256(audio_ids: Sequence[str], codes: Mapping[str, ClipCodes]) -> str:
    """Return the SHA-256 of the codes of all clips in order; results compare only if it is equal."""
    digest = hashlib.sha256()
    for audio_id in audio_ids:
        digest.update(codes[audio_id].codes_TQ.astype(np.int32).tobytes())
    return digest.hexdigest()


def _read(
    clip: Clip, codec: MimiCodec, max_seconds: float, known: Mapping[str, ClipCodes]
) -> tuple[str, Waveform | None]:
    """Return the SHA-256 of a clip's file, and its samples unless its codes are known."""
    content = clip.source.read_bytes()
    audio_id = hashlib.sha256(content).hexdigest()
    if audio_id in known:
        return audio_id, None
    name = str(clip.source) if isinstance(clip.source, Path) else clip.name
    waveform = read_audio(
        content, codec.sample_rate_hz, max_seconds=max_seconds, name=name, min_samples=codec.frame_size
    )
    if waveform.audio_warnings:  # half a clip, or one channel, has another score
        raise AudioError("damaged", f"'{name}' is {waveform.audio_warnings[0]}; fix it or copy it again")
    return audio_id, waveform
