"""Clips as token sequences.

``BOS <audio> c[0,0] c[0,1] ... c[T-1,Q-1] </audio>``, with the text between BOS and ``<audio>`` for the task "tts".
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llama_mimi.audio.mimi import load_codec_config
from llama_mimi.common.hub import load_pretrained
from llama_mimi.tokens.vocabulary import (
    AUDIO_START,
    Architecture,
    AudioVocabulary,
    VocabularyKind,
    audio_tokenizer,
    extend_tokenizer,
    text_ids,
)

IGNORE_INDEX = -100  # PyTorch's default, and TorchTitan's
NO_TOKEN = -1  # fills levels 1 to Q - 1 at text positions
Batch = tuple[dict[str, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class SpeechTokenizer:
    """Encodes clips as token ids.

    A position of the hierarchical architecture is a frame of Q ids, or one token of text and `NO_TOKEN`; else one id.
    """

    text_tokenizer: PreTrainedTokenizerBase
    vocabulary: AudioVocabulary
    architecture: Architecture = "flattened"

    @property
    def ids_per_position(self) -> int:
        """W, number of ids that the model reads, and predicts, at one position."""
        return 1 if self.architecture == "flattened" else self.vocabulary.num_quantizers

    @property
    def positions_per_frame(self) -> int:
        return self.vocabulary.num_quantizers // self.ids_per_position

    def batch(self, inputs_BLW: torch.Tensor, labels_BLW: torch.Tensor) -> Batch:
        """Return the model's inputs by name, and labels, of a training step."""
        if self.architecture == "flattened":
            return {"input": inputs_BLW[..., 0]}, labels_BLW[..., 0]
        return {"input": inputs_BLW, "targets": labels_BLW}, labels_BLW  # the depth decoder reads the labels, too

    def prefix_ids(self, text: str | None = None) -> list[int]:
        """Return the ids before the audio: BOS, the transcript as plain text (task "tts") and ``<audio>``."""
        transcript = [] if text is None else text_ids(self.text_tokenizer, text)
        return [self._bos_id, *transcript, self.vocabulary.audio_start_id]

    def encode(self, codes_TQ: torch.Tensor, *, is_cut: bool, text: str | None = None) -> torch.Tensor:
        """Return the ids (L,) of one clip, without ``</audio>`` if it was cut; ``text`` is its transcript."""
        tail = torch.tensor([] if is_cut else [self.vocabulary.audio_end_id], dtype=torch.long)
        return torch.cat([torch.tensor(self.prefix_ids(text)), self.vocabulary.ids_from_codes(codes_TQ), tail])

    @cached_property
    def adds_bos(self) -> bool:
        """True if the tokenizer itself adds BOS to a text, as those of released checkpoints do."""
        return self.text_tokenizer(AUDIO_START).input_ids[0] == self._bos_id

    @cached_property
    def _bos_id(self) -> int:
        return self.text_tokenizer.bos_token_id


@lru_cache(maxsize=4)
def load_speech_tokenizer(
    tokenizer_name: str,
    codec_name: str,
    num_quantizers: int,
    vocabulary: VocabularyKind = "llama",
    architecture: Architecture = "flattened",
) -> SpeechTokenizer:
    """Load a tokenizer (hub id or folder), and add the audio tokens of a codec unless it has them.

    The vocabulary "audio" has no text. Raises a `UserError` if the tokenizer is missing or does not fit the codec.
    """
    codebook_size = load_codec_config(codec_name, num_quantizers).codebook_size
    tokenizer = load_pretrained(AutoTokenizer, tokenizer_name, what="tokenizer")
    if vocabulary == "audio":
        tokenizer = audio_tokenizer(tokenizer)
    return SpeechTokenizer(*extend_tokenizer(tokenizer, codebook_size, num_quantizers), architecture)
