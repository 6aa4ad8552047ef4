"""FLOPs and data of a training step, and FLOPs of generation, computed without weights, data or a GPU."""

import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llama_mimi.audio.mimi import load_codec_config
from llama_mimi.checkpoint.stand_ins import write_missing
from llama_mimi.common.command_line import to_cli_args
from llama_mimi.model.architectures import build_model
from llama_mimi.model.llama import FLAVORS, LlamaMimiArgs
from llama_mimi.model.lora import LoRAConverter
from llama_mimi.tokens.tokenizer import build_speech_tokenizer
from llama_mimi.training.config_file import parse_config

CONTEXT_SECONDS = 10.0  # mean length of the context while 20 s are generated


class Cost(NamedTuple):
    """Cost of a model. Padded positions of a training step are included."""

    num_weights: int  # including embeddings
    step_flops: float  # per position: 6 FLOPs per weight of a matrix product (4 if frozen), and attention
    step_seconds: float  # seconds of audio in a training step
    generation_flops: float  # per second of new audio, after `CONTEXT_SECONDS` of audio, without prefill


_parsed = cache(lambda words: parse_config(list(words)))


def resolved(flags: Mapping[str, Any]) -> Any:
    """Return the checked job config for training flags. The config is cached: do not change it."""
    return _parsed(tuple(to_cli_args(flags)))


def cost(flags: Mapping[str, Any], num_ranks: int) -> Cost:
    """Return the cost of a model. ``num_ranks`` is used only if the flags do not set the global batch size."""
    return _cost(tuple(to_cli_args({key: flags[key] for key in flags if key != "loss.level_weights"})), num_ranks)


@cache
def _cost(words: tuple[str, ...], num_ranks: int) -> Cost:
    config = parse_config(list(words))  # a separate object, because write_missing changes the config
    with tempfile.TemporaryDirectory() as folder:
        write_missing(config, Path(folder))
        args = LlamaMimiArgs(**vars(FLAVORS[config.model.flavor]))
        args.update_from_config(config)
        positions_per_frame = build_speech_tokenizer(config).positions_per_frame
        codec = load_codec_config(config.codec.name, config.codec.num_quantizers)
    with torch.device("meta"):
        model = build_model(args)
    training, frame_rate_hz = config.training, codec.sampling_rate / codec.frame_size
    generation_flops = frame_rate_hz * model.decoding_flops(round(CONTEXT_SECONDS * frame_rate_hz))
    if config.model.converters == ["lora"]:  # updates are merged before generation
        LoRAConverter(config, None).convert(model)
    num_weights, flops_per_target = args.get_nparams_and_flops(model, training.seq_len)
    rows = training.global_batch_size if training.global_batch_size > 0 else training.local_batch_size * num_ranks
    num_frames = rows * training.seq_len / positions_per_frame
    return Cost(
        num_weights,
        num_frames * args.targets_per_frame * flops_per_target,
        num_frames / frame_rate_hz,
        generation_flops,
    )
