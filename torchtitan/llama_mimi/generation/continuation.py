"""Continuing speech: sampling that can only produce whole, ordered frames."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from llama_mimi.common.errors import UserError
from llama_mimi.generation.speech_model import SpeechModel
from llama_mimi.tokens.units import UnitVocabulary


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


class FrameGrammar(LogitsProcessor):
    """Allows at each position the codes of its level, and ``</audio>`` between frames only.

    Args:
        vocabulary: of the model.
        num_head_tokens: tokens up to and including ``<audio>``.
        min_frames: of prompt and continuation, before which the speech cannot end.
    """

    def __init__(self, vocabulary: UnitVocabulary, num_head_tokens: int, min_frames: int = 0) -> None:
        self._vocabulary, self._num_head_tokens, self._min_frames = vocabulary, num_head_tokens, min_frames

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        vocabulary = self._vocabulary
        frame, level = divmod(input_ids.shape[1] - self._num_head_tokens, vocabulary.num_quantizers)
        units = slice(vocabulary.base + level, vocabulary.audio_start_id, vocabulary.num_quantizers)
        allowed = torch.full_like(scores, -torch.inf)
        allowed[:, units] = scores[:, units]
        if level == 0 and frame >= self._min_frames:
            allowed[:, vocabulary.audio_end_id] = scores[:, vocabulary.audio_end_id]
        return allowed


@torch.inference_mode()
def continue_codes(model: SpeechModel, prompt_TQ: torch.Tensor, options: SamplingOptions) -> list[torch.Tensor]:
    """Continuations of a prompt.

    Args:
        prompt_TQ: codes of the prompt, which stay as they are.

    Returns:
        For each sample its codes_TQ, the prompt's frames first.

    Raises:
        UserError: prompt and continuation do not fit into the model's context.
    """
    vocabulary, decoder = model.sequences.vocabulary, model.decoder
    prompt_L = model.sequences.sequence(prompt_TQ, is_cut=True)  # no </audio>: the speech goes on
    num_head_tokens = len(prompt_L) - prompt_TQ.numel()
    num_new_frames = round(options.seconds * model.codec.frame_rate_hz)
    min_new_frames = math.ceil(options.min_seconds * model.codec.frame_rate_hz - 1e-6)
    num_new_frames = max(num_new_frames, min_new_frames)
    num_new_tokens = num_new_frames * vocabulary.num_quantizers
    context = decoder.config.max_position_embeddings
    if len(prompt_L) + num_new_tokens > context:
        raise UserError(
            f"prompt and continuation take {len(prompt_L) + num_new_tokens:,} tokens, more than the model's context of "
            f"{context:,}; shorten the prompt or --seconds"
        )
    sampling: dict[str, Any] = {"do_sample": False}
    if options.temperature > 0:
        sampling = {"do_sample": True, "temperature": options.temperature, "top_k": options.top_k}
    config = GenerationConfig(
        max_new_tokens=num_new_tokens,
        bos_token_id=model.sequences.tokenizer.bos_token_id,
        eos_token_id=vocabulary.audio_end_id,
        pad_token_id=vocabulary.audio_end_id,
        **sampling,
    )
    prompt_BL = prompt_L[None].repeat(options.num_samples, 1).to(model.device)
    torch.manual_seed(options.seed)
    ids_BL = decoder.generate(
        prompt_BL,
        attention_mask=torch.ones_like(prompt_BL),
        generation_config=config,
        logits_processor=LogitsProcessorList(
            [FrameGrammar(vocabulary, num_head_tokens, len(prompt_TQ) + min_new_frames)]
        ),
    )
    samples = []
    for ids_L in ids_BL[:, num_head_tokens:].cpu():
        units_L = ids_L[ids_L != vocabulary.audio_end_id]
        samples.append(vocabulary.codes_from_ids(units_L))
    return samples
