"""Tokenised corpora of random codes, with the clip lengths of real speech, and codes as text."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import MimiConfig

from llama_mimi.audio.mimi import codec_hash, load_codec_config
from llama_mimi.corpora.code_shards import CLIPS_PER_GROUP, FORMAT, MANIFEST, CodedClip, by_second, shard_bytes
from llama_mimi.tokens.vocabulary import AUDIO_END, AUDIO_START

STORED_LEVELS = 8


def text_from_codes(codes_TQ: torch.Tensor) -> str:
    """Return codes as text that a tokenizer can parse: ``<audio><c_0><c_1>...</audio>``."""
    tokens = "".join(f"<{code}_{level}>" for frame in codes_TQ.tolist() for level, code in enumerate(frame))
    return f"{AUDIO_START}{tokens}{AUDIO_END}"


def speech_lengths(number: int) -> np.ndarray:
    """Return clip lengths, in frames, like the lengths in The People's Speech: 14 s on average, and at most 20 s."""
    seconds = np.random.default_rng(0).normal(14, 4, 4 * number)
    return np.ceil(12.5 * seconds[(seconds > 1) & (seconds < 20)][:number]).astype(int)


def random_clips(frames: np.ndarray, config: MimiConfig) -> list[CodedClip]:
    """Return clips of random codes with the given lengths in frames."""
    generator = np.random.default_rng(0)
    codes = [generator.integers(0, config.codebook_size, (T, STORED_LEVELS)).astype(np.uint16) for T in frames]
    frame_s = config.frame_size / config.sampling_rate
    return [CodedClip(f"clip-{i}", codes_TQ, len(codes_TQ) * frame_s, False) for i, codes_TQ in enumerate(codes)]


def write_codes(
    folder: Path, codec: str, shards: Sequence[list[CodedClip]], optional_columns: Sequence[str] = ()
) -> str:
    """Write a complete tokenised corpus, and return its folder.

    Args:
        codec: hub id or folder of the codec.
        shards: list of clips for each shard; a list that is the same object as the first list becomes a hard link.
        optional_columns: further columns, such as "text" and "speaker".
    """
    columns = ["id", "codes", "duration", "is_cut", *optional_columns]
    folder.mkdir(parents=True)
    paths = [folder / f"shard-{number:06d}.parquet" for number in range(len(shards))]
    for path, clips in zip(paths, shards, strict=True):
        if clips is shards[0] and path != paths[0]:
            os.link(paths[0], path)
        else:
            path.write_bytes(shard_bytes(clips, STORED_LEVELS, {"columns": columns}))
    manifest = {
        "format": FORMAT,
        "codec": {
            "name": codec,
            "sha256": codec_hash(codec),
            "num_quantizers": STORED_LEVELS,
            "codebook_size": load_codec_config(codec, STORED_LEVELS).codebook_size,
            "sliding_window": True,
        },
        "columns": columns,
        "clips_per_group": CLIPS_PER_GROUP,
        "clips": sum(map(len, shards)),
        "by_second": by_second(np.array([clip.seconds for clips in shards for clip in clips])),
        "shards": [
            {"file": path.name, "clips": len(clips), "bytes": path.stat().st_size}
            for path, clips in zip(paths, shards, strict=True)
        ],
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return str(folder)
