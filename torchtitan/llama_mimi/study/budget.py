"""FLOPs of training, computed before it without a model, a GPU or data."""

import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from llama_mimi.audio.mimi import load_codec_config
from llama_mimi.checkpoint.stand_ins import write_missing
from llama_mimi.common.command_line import to_cli_args
from llama_mimi.corpora.code_shards import MANIFEST, CodeCorpus
from llama_mimi.model.architectures import build_model
from llama_mimi.model.llama import FLAVORS, LlamaMimiArgs
from llama_mimi.training.config_file import parse_config

_parsed = cache(lambda words: parse_config(list(words)))


def resolved(flags: Mapping[str, Any]) -> Any:
    """Return the job config of training flags; it is cached: do not change it. Raises `UserError` if one is refused."""
    return _parsed(tuple(to_cli_args(flags)))


def is_packed_or_tokenised(flags: Mapping[str, Any]) -> bool:
    """Return True if the length of rows is known: they are packed, or clips of a tokenised corpus."""
    config = resolved(flags)
    return config.data.packing == "pack" or (Path(config.training.dataset) / MANIFEST).is_file()


def step_flops(flags: Mapping[str, Any], num_ranks: int) -> float:
    """Return the FLOPs of a training step: 6 for each weight that a position is multiplied with, and attention.

    Attention is over the whole row. A row of which the length is unknown counts as full.

    Args:
        flags: settings of training.
        num_ranks: ranks that share a step, if the flags do not set its global batch.

    Raises:
        UserError: a setting is refused.
    """
    config = resolved(flags)
    training, codec = config.training, config.codec
    flops_per_frame, frame_rate_hz = _frame_cost(tuple(to_cli_args(flags)))
    rows = training.global_batch_size if training.global_batch_size > 0 else training.local_batch_size * num_ranks
    frames = training.seq_len / (codec.num_quantizers if config.model.architecture == "flattened" else 1)
    if config.data.packing == "pad" and is_packed_or_tokenised(flags):
        corpus = CodeCorpus(training.dataset, codec.name, codec.num_quantizers, codec.sliding_window, with_text=False)
        frames = min(frames, frame_rate_hz * corpus.mean_seconds(config.data.max_audio_seconds))
    return rows * frames * flops_per_frame


@cache
def _frame_cost(words: tuple[str, ...]) -> tuple[float, float]:
    """Return the training FLOPs of a frame of audio, and the frames per second."""
    config = parse_config(list(words))  # write_missing changes it
    with tempfile.TemporaryDirectory() as folder:
        write_missing(config, Path(folder))
        args = LlamaMimiArgs(**vars(FLAVORS[config.model.flavor]))
        args.update_from_config(config)
        codec = load_codec_config(config.codec.name, config.codec.num_quantizers)
    with torch.device("meta"):
        _, flops_per_target = args.get_nparams_and_flops(build_model(args), config.training.seq_len)
    return args.targets_per_frame * flops_per_target, codec.sampling_rate / codec.frame_size
