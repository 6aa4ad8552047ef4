"""Continuing speech: how long, and how it is drawn."""

import math
from dataclasses import dataclass

import torch

from llama_mimi.common.errors import UserError
from llama_mimi.generation.speech_model import Sampling, SpeechModel


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How tokens are drawn.

    Args:
        seconds: of new audio at most; a sample ends earlier where the model ends the speech.
        min_seconds: of new audio at least; the model cannot end the speech before.
        temperature: 0 takes the likeliest token.
        top_k: sample from so many likeliest tokens.
        seed: same seed, same samples.
        num_samples: continuations of the same prompt.

    Raises:
        UserError: a value out of range.
    """

    seconds: float = 10.0
    min_seconds: float = 0.0
    temperature: float = 0.8
    top_k: int = 30
    seed: int = 0
    num_samples: int = 1

    def __post_init__(self) -> None:
        for name, is_valid in {
            "seconds": 0.08 <= self.seconds < float("inf"),
            "min_seconds": 0 <= self.min_seconds < float("inf"),
            "temperature": self.temperature >= 0,
            "top_k": self.top_k >= 1,
            "num_samples": self.num_samples >= 1,
        }.items():
            if not is_valid:
                raise UserError(f"--{name} is {getattr(self, name)}, which is out of range; see --help")
        if self.min_seconds > self.seconds:
            raise UserError(f"--min_seconds is {self.min_seconds:g}, more than --seconds {self.seconds:g}; raise that")


def continue_codes(model: SpeechModel, prompt_TQ: torch.Tensor, options: SamplingOptions) -> list[torch.Tensor]:
    """Continuations of a prompt.

    Args:
        prompt_TQ: codes of the prompt, which stay as they are.

    Returns:
        For each sample its codes_TQ, the prompt's frames first.

    Raises:
        UserError: prompt and continuation do not fit into the model's context.
    """
    num_head_tokens = len(model.sequences.head())
    max_frames = round(options.seconds * model.codec.frame_rate_hz)
    min_frames = math.ceil(options.min_seconds * model.codec.frame_rate_hz - 1e-6)
    max_frames = max(max_frames, min_frames)
    num_positions = model.num_positions(num_head_tokens, len(prompt_TQ) + max_frames)
    context = model.decoder.config.max_position_embeddings
    if num_positions > context:
        raise UserError(
            f"prompt and continuation take {num_positions:,} positions, more than the model's context of {context:,}; "
            "shorten the prompt or --seconds"
        )
    torch.manual_seed(options.seed)
    sampling = Sampling(max_frames, min_frames, options.temperature, options.top_k, options.num_samples)
    return model.generate(prompt_TQ, sampling)
