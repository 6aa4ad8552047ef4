"""A converted or released checkpoint, ready to score or continue speech: what both architectures do alike."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from transformers import PreTrainedModel

from llama_mimi.audio.mimi import DTYPES, MimiCodec
from llama_mimi.tokens.sequences import SequenceBuilder

# Precisions of the decoder. The first release of Llama-Mimi is evaluated in float16.
DecoderPrecision = Literal["float32", "bfloat16", "float16"]
DECODER_DTYPES = {**DTYPES, "float16": torch.float16}
# Positions whose logits are made at once: 1.1 GB in float32 at the 136,450 entries of Llama 3 with 4 levels.
POSITIONS_AT_ONCE = 2048


@dataclass(frozen=True)
class Sampling:
    """How new frames are drawn.

    Args:
        max_frames, min_frames: of new audio; the speech cannot end before, and does not go on after.
        temperature: 0 takes the likeliest entry.
        top_k: sample from so many likeliest entries.
        num_samples: B, continuations of one prompt.
    """

    max_frames: int
    min_frames: int
    temperature: float
    top_k: int
    num_samples: int


@dataclass(frozen=True)
class SpeechModel(ABC):
    """Decoder, tokenizer with units, and codec of one checkpoint, on one device."""

    has_release: ClassVar[bool]  # models of its kind, and so a scoring of theirs

    decoder: PreTrainedModel
    sequences: SequenceBuilder
    codec: MimiCodec

    @property
    def device(self) -> torch.device:
        return self.codec.device

    def to(self, device: torch.device | str) -> Self:
        """The same model on another device; its weights are moved, not copied."""
        return replace(self, decoder=self.decoder.to(device), codec=self.codec.to(device))

    @abstractmethod
    def log_likelihoods(self, ids: Sequence[torch.Tensor], is_scored: Sequence[torch.Tensor]) -> torch.Tensor:
        """Log-likelihoods (N,) in nats, float64 on the CPU, of the scored tokens of clips that share a batch.

        Args:
            ids: of each clip, flattened (L,).
            is_scored: for each of them whether it is one of the N.
        """

    @abstractmethod
    def num_positions(self, num_head_tokens: int, num_frames: int) -> int:
        """Positions of the context that a sequence takes."""

    @abstractmethod
    def generate(self, prompt_TQ: torch.Tensor, sampling: Sampling) -> list[torch.Tensor]:
        """Continuations of a prompt, from PyTorch's own random numbers: for each codes_TQ, the prompt's first."""


def log_likelihoods(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """Log-likelihoods (N,) in nats, float64, of targets under logits of any precision."""
    logits_NV = logits_NV.float()
    target_N = logits_NV.gather(1, targets_N[:, None])[:, 0]
    return target_N.double() - logits_NV.logsumexp(dim=1).double()


def draw(logits_BV: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Entries (B,) by temperature and top-k."""
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1)
    values_Bk, entries_Bk = logits_BV.topk(min(sampling.top_k, logits_BV.shape[-1]))
    places_B1 = torch.multinomial((values_Bk / sampling.temperature).softmax(dim=-1), 1)
    return entries_Bk.gather(1, places_B1)[:, 0]
