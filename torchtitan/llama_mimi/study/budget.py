"""FLOPs of training, computed without weights, data or a GPU."""

import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from llama_mimi.checkpoint.stand_ins import write_missing
from llama_mimi.common.command_line import to_cli_args
from llama_mimi.model.architectures import build_model
from llama_mimi.model.llama import FLAVORS, LlamaMimiArgs
from llama_mimi.training.config_file import parse_config

_parsed = cache(lambda words: parse_config(list(words)))


def resolved(flags: Mapping[str, Any]) -> Any:
    """Return the checked job config for training flags. The config is cached: do not change it."""
    return _parsed(tuple(to_cli_args(flags)))


def step_flops(flags: Mapping[str, Any], num_ranks: int) -> float:
    """Return the FLOPs of a training step: 6 FLOPs per position and weight, plus the FLOPs of attention.

    Padded positions are included. ``num_ranks`` is used only if the flags do not set the global batch size.
    """
    config = parse_config(to_cli_args(flags))  # not cached, because write_missing changes the config
    with tempfile.TemporaryDirectory() as folder:
        write_missing(config, Path(folder))
        args = LlamaMimiArgs(**vars(FLAVORS[config.model.flavor]))
        args.update_from_config(config)
    with torch.device("meta"):
        _, flops_per_target = args.get_nparams_and_flops(build_model(args), config.training.seq_len)
    training, is_flattened = config.training, config.model.architecture == "flattened"
    rows = training.global_batch_size if training.global_batch_size > 0 else training.local_batch_size * num_ranks
    return rows * training.seq_len * flops_per_target * (1 if is_flattened else args.targets_per_frame)
