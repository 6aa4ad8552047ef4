"""A converted or released checkpoint, ready to score or continue speech: what both architectures do alike."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal, Self

import torch
from transformers import PreTrainedModel

from llama_mimi.audio.mimi import DTYPES, LastFrame, MimiCodec, is_released
from llama_mimi.generation.row_cache import RowCache
from llama_mimi.tokens.sequences import SequenceBuilder

# Precisions of the decoder. The first release of Llama-Mimi is evaluated in float16.
DecoderPrecision = Literal["float32", "bfloat16", "float16"]
DECODER_DTYPES = {**DTYPES, "float16": torch.float16}
# Positions whose logits are made at once: 1.1 GB in float32 at the 136,450 entries of Llama 3 with 4 levels.
POSITIONS_AT_ONCE = 2048
# Draws entries (B,) of a level from their logits (B, K), or (B, K + 1) at level 0, whose entry K ends the speech.
Draw = Callable[[torch.Tensor, int], torch.Tensor]


class FrameDecoder(ABC):
    """B contexts of a model, which grow by a frame at a time.

    Args:
        model: whose body reads them.
        num_rows: B.
        capacity: positions of each.
    """

    def __init__(self, model: "SpeechModel", num_rows: int, capacity: int) -> None:
        self._model = model
        self._contexts = RowCache(model.body, num_rows, capacity)
        # The body's states at the last position of each.
        size = model.body.config.hidden_size
        self._hidden_BD = torch.zeros(num_rows, size, dtype=model.decoder.dtype, device=model.device)

    def fill(self, row: int, head: Sequence[int], codes_TQ: torch.Tensor) -> None:
        """Give a row another context: the tokens before the frames, and frames."""
        self._hidden_BD[row] = self._contexts.fill(row, self._model.embed(head, codes_TQ))

    def clear(self, row: int) -> None:
        """Nobody reads this row until it is filled again."""
        self._contexts.clear(row)

    @abstractmethod
    def next_frame(self, draw: Draw) -> torch.Tensor:
        """Draw entries (B, Q), which the contexts then grow by.

        A frame whose level 0 is the end is to be left out: what its other levels hold means nothing.
        """


@dataclass(frozen=True)
class SpeechModel(ABC):
    """Decoder, tokenizer with units, and codec of one checkpoint, on one device.

    Args:
        top_p: of the checkpoint's generation config.
    """

    has_release: ClassVar[bool]  # models of its kind, and so a scoring of theirs

    decoder: PreTrainedModel
    sequences: SequenceBuilder
    codec: MimiCodec
    top_p: float = 1.0

    @property
    def device(self) -> torch.device:
        return self.codec.device

    @property
    def trained_seconds(self) -> float:
        """The longest clip of its training; a checkpoint that does not say is taken for the paper's, 20 s."""
        return getattr(self.decoder.config, "max_audio_seconds", 20.0)

    @property
    def last_frame(self) -> LastFrame:
        """How partial last frames of the training clips were encoded."""
        return "codec" if self.has_release and is_released(self.decoder.config) else "pad"

    @property
    def end_entry(self) -> int:
        """K, the entry of level 0 that stands for the end of the speech."""
        return self.sequences.vocabulary.codebook_size

    def to(self, device: torch.device | str) -> Self:
        """The same model on another device; its weights are moved, not copied."""
        return replace(self, decoder=self.decoder.to(device), codec=self.codec.to(device))

    @abstractmethod
    def log_likelihoods(
        self, ids: Sequence[torch.Tensor], is_scored: Sequence[torch.Tensor], *, is_admissible_only: bool = False
    ) -> torch.Tensor:
        """Log-likelihoods (N,) in nats, float64 on the CPU, of the scored tokens of clips that share a batch.

        Args:
            ids: of each clip, flattened (L,).
            is_scored: for each of them whether it is one of the N.
            is_admissible_only: the softmax is over the tokens that can stand at a position, as in generation, in place
                of the whole vocabulary. Only codes and ``</audio>`` can be scored.
        """

    @property
    @abstractmethod
    def body(self) -> PreTrainedModel:
        """The causal Transformer that reads a sequence, without its output layer."""

    @property
    @abstractmethod
    def positions_per_frame(self) -> int:
        """Positions of the body that a frame takes."""

    @abstractmethod
    def embed(self, head: Sequence[int] | torch.Tensor, codes_TQ: torch.Tensor) -> torch.Tensor:
        """What the body reads (L, D) of the tokens before the frames, and of frames."""

    @abstractmethod
    def frame_decoder(self, num_rows: int, capacity: int) -> FrameDecoder:
        """For contexts of ``capacity`` positions at most, ``num_rows`` side by side."""

    @cached_property
    def spare_decoders(self) -> dict[tuple[int, int], FrameDecoder]:
        """The frame decoder used last, by its rows and capacity: on a GPU it has a graph that takes long to make."""
        return {}


def log_likelihoods(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """Log-likelihoods (N,) in nats, float64, of targets under logits of any precision."""
    logits_NV = logits_NV.float()
    target_N = logits_NV.gather(1, targets_N[:, None])[:, 0]
    return target_N.double() - logits_NV.logsumexp(dim=1).double()
