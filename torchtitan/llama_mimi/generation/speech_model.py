"""Interface to a converted or released checkpoint, to score and to continue speech."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import PreTrainedModel

from llama_mimi.audio.mimi import DTYPES, MimiCodec, is_released
from llama_mimi.common.choices import LastFrame
from llama_mimi.generation.kv_cache import BatchedKVCache
from llama_mimi.tokens.tokenizer import SpeechTokenizer

DECODER_DTYPES = {**DTYPES, "float16": torch.float16, "int8": torch.bfloat16}
POSITIONS_AT_ONCE = 2048  # the logits of 2048 positions take 1.1 GB in float32 with 136,450 vocabulary entries
# Function (logits, level) that draws entries (B,). Logits are (B, K + 1) at level 0 (entry K is the end), else (B, K).
Draw = Callable[[torch.Tensor, int], torch.Tensor]


@dataclass(frozen=True)
class SpeechModel(ABC):
    """A checkpoint: decoder, tokenizer with audio tokens, codec, and ``top_p`` of the generation config."""

    decoder: PreTrainedModel
    tokenizer: SpeechTokenizer
    codec: MimiCodec
    top_p: float = 1.0
    is_int8: bool = False

    def __post_init__(self) -> None:
        # On Hopper, PyTorch would choose cuDNN's attention, which needs 60 ms to build a plan for each prompt length.
        torch.backends.cuda.enable_cudnn_sdp(False)

    @property
    def device(self) -> torch.device:
        return self.codec.device

    @property
    def dtype(self) -> str:
        """Precision of the decoder."""
        return "int8" if self.is_int8 else str(self.decoder.dtype).removeprefix("torch.")

    @property
    def last_frame(self) -> LastFrame:
        """Encoding of partial last frames of training clips: 'codec' or 'pad'."""
        return "codec" if is_released(self.decoder.config) else "pad"

    @property
    def end_entry(self) -> int:
        """K, the entry of level 0 that ends the speech."""
        return self.tokenizer.vocabulary.codebook_size

    @property
    @abstractmethod
    def backbone(self) -> PreTrainedModel:
        """The causal Transformer over a sequence, without its output layer."""

    @abstractmethod
    def embed(self, prefix: Sequence[int] | torch.Tensor, codes_TQ: torch.Tensor) -> torch.Tensor:
        """Return the backbone's inputs (L, D): embeddings of the prefix ids, followed by embeddings of the frames."""

    @abstractmethod
    def log_likelihoods(
        self, ids: Sequence[torch.Tensor], *is_scored: Sequence[torch.Tensor], is_admissible_only: bool = False
    ) -> list[torch.Tensor]:
        """Return the log-likelihoods (L,) of each clip's tokens, in nats (float64, on the CPU); NaN if not scored.

        Args:
            ids: flattened sequence (L,) of each clip.
            is_scored: sets of tokens to score. A set has a mask (L,) for each clip. The backbone runs once. Each set
                has its own matrix products in the output layer, so the values of a set do not depend on the other sets.
            is_admissible_only: compute the softmax over the tokens that are valid at a position, as in generation,
                instead of over the whole vocabulary. Only codes and ``</audio>`` can then be scored.
        """

    def caches(self, num_rows: int, capacity: int) -> list[BatchedKVCache]:
        """Return empty caches for `next_frame`; the first cache is for the backbone and has ``capacity`` positions."""
        return [BatchedKVCache(self.backbone, num_rows, capacity, self.is_int8)]

    @abstractmethod
    def next_frame(self, caches: Sequence[BatchedKVCache], draw: Draw) -> torch.Tensor:
        """Draw and append the next frame of each context; return entries (B, Q).

        If the entry of level 0 is the end, the other entries of the frame are arbitrary.
        """

    @cached_property
    def spare_caches(self) -> dict[tuple[int, int], list[BatchedKVCache]]:
        """Caches for reuse, by number of rows and capacity. Creating a cache is slow if CUDA graphs are compiled."""
        return {}


def log_likelihoods(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """Return the log-likelihoods of N targets, in nats (float64). The logits can have any precision."""
    logits_NV = logits_NV.float()
    target_N = logits_NV.gather(1, targets_N[:, None])[:, 0]
    return target_N.double() - logits_NV.logsumexp(dim=1).double()
