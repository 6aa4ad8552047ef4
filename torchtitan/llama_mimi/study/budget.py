"""What training costs, before it is done: FLOPs of a step, and hours of a GPU for them."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llama_mimi.audio.mimi import load_codec_config
from llama_mimi.checkpoint.stand_ins import write_missing
from llama_mimi.data.code_store import MANIFEST, CodeCorpus
from llama_mimi.model.architectures import build_model
from llama_mimi.model.llama import FLAVORS, LlamaMimiArgs
from llama_mimi.training.config_file import as_words, parse_config


@dataclass(frozen=True)
class StepCost:
    """A step of training.

    Args:
        flops: 6 a weight that a position is multiplied with, and attention over its whole row.
        frames: of audio that it trains on.
    """

    flops: float
    frames: float


def cost_of_step(flags: Mapping[str, Any], num_ranks: int) -> StepCost:
    """What a step costs, without a model, a GPU or data.

    Clips one a row count with their mean length where the training data is a tokenised corpus that is here, else as
    whole rows.

    Args:
        flags: of training.
        num_ranks: that share a step, where the flags do not say its global batch.

    Raises:
        UserError: a setting is refused.
    """
    job_config = parse_config(as_words(flags))
    with tempfile.TemporaryDirectory() as folder:
        write_missing(job_config, Path(folder))
        args = LlamaMimiArgs(**vars(FLAVORS[job_config.model.flavor]))
        args.update_from_config(job_config)
        frame_rate_hz = _frame_rate_hz(job_config)
    with torch.device("meta"):
        model = build_model(args)
    training, Q = job_config.training, job_config.codec.num_quantizers
    flops_per_frame = Q * args.get_nparams_and_flops(model, training.seq_len)[1]
    rows = training.global_batch_size if training.global_batch_size > 0 else training.local_batch_size * num_ranks
    positions = Q if job_config.model.architecture == "flattened" else 1
    frames_of_row = training.seq_len / positions
    if job_config.data.packing == "pad" and (Path(training.dataset) / MANIFEST).is_file():
        corpus = CodeCorpus(training.dataset, job_config.codec.name, Q, job_config.codec.attention, with_text=False)
        frames_of_row = min(frames_of_row, frame_rate_hz * corpus.mean_seconds(job_config.data.max_audio_seconds))
    return StepCost(rows * frames_of_row * flops_per_frame, rows * frames_of_row)


def decay_begins(flags: Mapping[str, Any], steps: int) -> int:
    """The last step before the learning rate of so many steps decays; 0 if it has no constant part."""
    schedule = parse_config(as_words(flags)).lr_scheduler
    decay = steps - schedule.warmup_steps if schedule.decay_ratio is None else round(steps * schedule.decay_ratio)
    begin = steps - decay
    return begin if begin > schedule.warmup_steps else 0


def _frame_rate_hz(job_config: Any) -> float:
    config = load_codec_config(job_config.codec.name, job_config.codec.num_quantizers)
    return config.sampling_rate / config.frame_size
