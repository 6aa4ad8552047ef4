"""Interface to a converted or released checkpoint, to score sequences and to generate speech and text."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from llama_mimi.audio.mimi import DTYPES, MimiCodec, is_released
from llama_mimi.common.choices import AUDIO_TARGETS, LastFrame, Task
from llama_mimi.common.errors import UserError
from llama_mimi.generation.kv_cache import BatchedKVCache
from llama_mimi.tokens.tokenizer import SpeechTokenizer
from llama_mimi.tokens.vocabulary import has_text

MIN_CAPACITY = 256  # capacities are this number times a power of two, so that most caches have the same size
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
    # Caches for reuse, by number of rows and capacity. Creating a cache is slow if CUDA graphs are compiled.
    spare_caches: dict[tuple[int, int], list[BatchedKVCache]] = field(default_factory=dict, init=False, compare=False)

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
    def tasks(self) -> list[str]:
        """Training tasks. The config of a released checkpoint does not name tasks; such a checkpoint may speak text."""
        if not has_text(self.tokenizer.text_tokenizer):
            return ["audio"]
        config = self.decoder.config
        return getattr(config, "tasks", None) or [getattr(config, "task", "tts").replace("a2a", "audio")]

    def require_task(self, purpose: str, *tasks: Task) -> None:
        """Raise a `UserError` if ``purpose`` needs one of the tasks, and the model was not trained on any of them."""
        if not {*tasks} & {*self.tasks}:
            names = " or ".join(f"'{task}'" for task in tasks)
            problem = f"{purpose} needs the task {names}, but the model was trained on {', '.join(self.tasks)}"
            raise UserError(f"{problem}; choose another model, or add '{tasks[0]}' to data.tasks and train a model")

    def require_speech(self, has_text: bool) -> None:
        """Raise a `UserError` if the model cannot generate speech, or cannot speak a text (if ``has_text``)."""
        purpose = "a text to speak" if has_text else "speech generation"
        self.require_task(purpose, *(("tts",) if has_text else AUDIO_TARGETS))

    def require_finite(self, is_finite: torch.Tensor) -> None:
        """Raise a `UserError` about overflow if ``is_finite``, computed from logits, is False."""
        if not is_finite:
            remedy = "set --dtype float32, or use another checkpoint"
            raise UserError(f"logits are not finite: the model overflows in {self.dtype}; {remedy}")

    @property
    @abstractmethod
    def backbone(self) -> PreTrainedModel:
        """The causal Transformer over a sequence, without its output layer."""

    @property
    @abstractmethod
    def output_VD(self) -> torch.Tensor:
        """Output matrix over the whole vocabulary; raises a `UserError` if the model cannot predict text."""

    @abstractmethod
    def embed(self, ids_L: torch.Tensor) -> torch.Tensor:
        """Return the backbone's inputs (P, D) for a flattened sequence. Flattened models have P = L positions."""

    @abstractmethod
    def log_likelihoods(
        self, ids: Sequence[torch.Tensor], *is_scored: Sequence[torch.Tensor], is_admissible_only: bool = False
    ) -> list[torch.Tensor]:
        """Return the log-likelihoods (L,) of each sequence's tokens, in nats (float64, on the CPU); NaN if not scored.

        Args:
            ids: flattened sequences (L,) of any training task.
            is_scored: sets of tokens to score. A set has a mask (L,) for each sequence. The first token of a sequence
                cannot be scored. The backbone runs once. Each set has its own matrix products in the output layer, so
                the values of a set do not depend on the other sets.
            is_admissible_only: compute the softmax over the tokens that are valid at a position, as in generation,
                instead of over the whole vocabulary. Only codes and ``</audio>`` can then be scored.

        Raises:
            UserError: text is scored, but the model cannot predict text.
        """

    def _vocabulary_log_likelihoods(self, hidden_ND: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        """Return the log-likelihoods (N,) of ids under softmax over the whole vocabulary, given hidden states."""
        chunks = zip(hidden_ND.split(POSITIONS_AT_ONCE), targets_N.split(POSITIONS_AT_ONCE), strict=True)
        return torch.cat([log_likelihoods(F.linear(h_ND, self.output_VD), t_N) for h_ND, t_N in chunks])

    def caches(self, num_rows: int, capacity: int) -> list[BatchedKVCache]:
        """Return empty caches for `next_frame`; the first cache is for the backbone and has ``capacity`` positions."""
        return [BatchedKVCache(self.backbone, num_rows, capacity, self.is_int8)]

    @contextmanager
    def borrow_caches(self, num_rows: int, capacity: int) -> Iterator[list[BatchedKVCache]]:
        """Yield `caches` of at least ``capacity`` positions with unused rows. The next call may use them again."""
        context = self.backbone.config.max_position_embeddings
        size = (num_rows, min(max(MIN_CAPACITY, 1 << (capacity - 1).bit_length()), context))
        caches = self.spare_caches.pop(size, None) or self.caches(*size)
        for row in range(num_rows):
            caches[0].reset(row)
        yield caches
        self.spare_caches.clear()
        self.spare_caches[size] = caches

    @abstractmethod
    def next_frame(self, caches: Sequence[BatchedKVCache], draw: Draw) -> torch.Tensor:
        """Draw and append the next frame of each context; return entries (B, Q).

        If the entry of level 0 is the end, the other entries of the frame are arbitrary.
        """


def log_likelihoods(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """Return the log-likelihoods of N targets, in nats (float64). The logits can have any precision."""
    logits_NV = logits_NV.float()
    target_N = logits_NV.gather(1, targets_N[:, None])[:, 0]
    return target_N.double() - logits_NV.logsumexp(dim=1).double()
