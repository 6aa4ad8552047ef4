"""Cache for the codes of benchmark clips, in Parquet shards. Models with the same codec share the cached codes.

The ``id`` of a row is the SHA-256 of the audio file. The folder's name is a hash of the codec and all settings.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from uuid import uuid4

import numpy as np
from tqdm import tqdm

from llama_mimi.audio.mimi import MimiCodec, codec_hash
from llama_mimi.audio.reading import AudioError, Waveform, read_audio
from llama_mimi.common.distributed import DistributedContext, broadcast_from_rank0, gather
from llama_mimi.common.files import digest, find_files, write_atomically
from llama_mimi.common.versions import versions
from llama_mimi.corpora.code_shards import CodedClip, coded_rows, read_shard, shard_bytes
from llama_mimi.evaluation.benchmarks import Clip

STORED_LEVELS = 8  # quantizer levels in the cache; models with fewer levels ignore the rest
CLIPS_PER_CHUNK = 64  # number of clips that are encoded and written together
READERS = 4  # threads that read and resample audio
ENCODING = 2  # increase this number after a change of reading, resampling, cutting or encoding


def encode_clips(
    codec: MimiCodec,
    clips: Sequence[Clip],
    codes_dir: str,
    ranks: DistributedContext,
    max_seconds: float,
    *,
    as_released: bool = False,
) -> tuple[list[str], dict[str, CodedClip]]:
    """Return the SHA-256 of each clip's audio, and a dict from SHA-256 to codes. Unusable clips raise an `AudioError`.

    Args:
        codes_dir: parent folder of the caches, a local or fsspec path.
        max_seconds: maximum length of a clip, in seconds; longer clips are cut.
        as_released: encode clips one by one, and let the codec pad a partial last frame, as in Llama-Mimi's release.
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
    folder = f"{codes_dir.rstrip('/')}/{digest(settings)[:16]}"

    def load() -> dict[str, CodedClip]:
        shards = (read_shard(path, ["id", "codes", "is_cut"]) for path in find_files(folder, (".parquet",)))
        rows = (row for shard in shards for row in coded_rows(shard))
        return {row["id"]: CodedClip(row["id"], row["codes"], 0.0, row["is_cut"]) for row in rows}

    def audio_id(clip: Clip) -> str:
        return hashlib.sha256(clip.source.read_bytes()).hexdigest()

    def read(clip: Clip) -> Waveform:
        name = str(clip.source) if isinstance(clip.source, Path) else clip.name
        content, rate_hz, frame_size = clip.source.read_bytes(), deep.sample_rate_hz, deep.frame_size
        waveform = read_audio(content, rate_hz, max_seconds=max_seconds, name=name, min_samples=frame_size)
        if waveform.audio_warnings:  # the score of a damaged clip would be wrong
            raise AudioError("damaged", f"'{name}' is {waveform.audio_warnings[0]}; replace it with an intact file")
        return waveform

    known, num_ranks = broadcast_from_rank0(load), ranks.world_size
    made: dict[str, CodedClip] = {}
    with ThreadPoolExecutor(READERS) as pool:
        ids_of_ranks = gather(list(pool.map(audio_id, clips[ranks.rank :: num_ranks])))
        audio_ids = [ids_of_ranks[number % num_ranks][number // num_ranks] for number in range(len(clips))]
        new = {i: clip for i, clip in zip(audio_ids, clips, strict=True) if i not in known}
        mine = list(new.items())[ranks.rank :: num_ranks]
        chunks = [dict(mine[start : start + CLIPS_PER_CHUNK]) for start in range(0, len(mine), CLIPS_PER_CHUNK)]
        started = (pool.map(read, chunk.values()) for chunk in chunks)
        ahead = pairwise(chain(started, [iter(())]))  # the next chunk is read while a chunk is encoded
        progress = tqdm(chunks, desc="codes", unit="chunk", disable=ranks.rank > 0)
        for chunk, (reading, _) in zip(progress, ahead, strict=True):
            waveforms = list(reading)
            samples = [waveform.samples_S for waveform in waveforms]
            encoded = list(map(deep.encode_as_released, samples)) if as_released else deep.encode_many(samples)
            stored = {}
            for i, waveform, codes_TQ in zip(chunk, waveforms, encoded, strict=True):
                codes, seconds = codes_TQ.numpy().astype(np.uint16), len(codes_TQ) / codec.frame_rate_hz
                stored[i] = CodedClip(i, codes, seconds, waveform.is_cut)
            made |= stored
            content = shard_bytes(list(stored.values()), deep.num_quantizers, {"columns": [], **settings})
            write_atomically(folder, f"shard-{uuid4().hex}.parquet", content)
    for part in gather(made):
        known |= part
    return audio_ids, {i: replace(known[i], codes_TQ=known[i].codes_TQ[:, : codec.num_quantizers]) for i in audio_ids}
