"""What training costs, before it is done: FLOPs of a step, and hours of a GPU for them."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from llama_mimi.audio.mimi import load_codec_config
from llama_mimi.checkpoint.stand_ins import write_missing
from llama_mimi.common.command_line import as_words
from llama_mimi.data.code_store import MANIFEST, CodeCorpus
from llama_mimi.model.architectures import build_model
from llama_mimi.model.llama import FLAVORS, LlamaMimiArgs
from llama_mimi.training.config_file import parse_config


@dataclass(frozen=True)
class StepCost:
    """A step of training.

    Args:
        flops: 6 a weight that a position is multiplied with, and attention over its whole row.
        frames: of audio that it trains on.
        is_known: clips one a row are as long as those of the tokenised corpus; if it is not here, as their rows.
    """

    flops: float
    frames: float
    is_known: bool


@cache
def _parsed(words: tuple[str, ...]) -> Any:
    return parse_config(list(words))


def resolved(flags: Mapping[str, Any]) -> Any:
    """The job config that flags make, which is not to be changed: it is parsed once.

    Raises:
        UserError: a setting is refused.
    """
    return _parsed(tuple(as_words(flags)))


def cost_of_step(flags: Mapping[str, Any], num_ranks: int) -> StepCost:
    """What a step costs, without a model, a GPU or data.

    Args:
        flags: of training.
        num_ranks: that share a step, where the flags do not say its global batch.

    Raises:
        UserError: a setting is refused.
    """
    job_config = resolved(flags)
    training, codec = job_config.training, job_config.codec
    flops_per_frame, frame_rate_hz = _cost_of_frame(tuple(as_words(flags)))
    rows = training.global_batch_size if training.global_batch_size > 0 else training.local_batch_size * num_ranks
    positions = codec.num_quantizers if job_config.model.architecture == "flattened" else 1
    frames_of_row = training.seq_len / positions
    is_known = job_config.data.packing == "pack" or (Path(training.dataset) / MANIFEST).is_file()
    if job_config.data.packing == "pad" and is_known:
        corpus = CodeCorpus(training.dataset, codec.name, codec.num_quantizers, codec.attention, with_text=False)
        frames_of_row = min(frames_of_row, frame_rate_hz * corpus.mean_seconds(job_config.data.max_audio_seconds))
    return StepCost(rows * frames_of_row * flops_per_frame, rows * frames_of_row, is_known)


@cache
def _cost_of_frame(words: tuple[str, ...]) -> tuple[float, float]:
    """FLOPs of a frame of audio, and frames a second, of training with these flags."""
    job_config = parse_config(list(words))
    with tempfile.TemporaryDirectory() as folder:
        write_missing(job_config, Path(folder))
        args = LlamaMimiArgs(**vars(FLAVORS[job_config.model.flavor]))
        args.update_from_config(job_config)
        codec = load_codec_config(job_config.codec.name, job_config.codec.num_quantizers)
    with torch.device("meta"):
        model = build_model(args)
    _, flops_per_target = args.get_nparams_and_flops(model, job_config.training.seq_len)
    return args.targets_per_frame * flops_per_target, codec.sampling_rate / codec.frame_size


def decay_begins(flags: Mapping[str, Any], steps: int) -> int:
    """The last step before the learning rate of so many steps decays; 0 if it has no constant part."""
    schedule = resolved(flags).lr_scheduler
    decay = steps - schedule.warmup_steps if schedule.decay_ratio is None else round(steps * schedule.decay_ratio)
    begin = steps - decay
    return begin if begin > schedule.warmup_steps else 0
