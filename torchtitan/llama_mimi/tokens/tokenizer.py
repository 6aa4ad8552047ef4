"""Token sequences of the training tasks. ``codes`` are ``c[0,0] c[0,1] ... c[T-1,Q-1]`` of a clip.

- "audio": ``BOS <audio> codes </audio>``
- "tts": ``BOS text <audio> codes </audio>``
- "asr": ``BOS <audio> codes </audio> text EOS``
- "interleaved": ``BOS``, then consecutive utterances of a speaker, in turn as text and as ``<audio> codes </audio>``. A
  newline follows each utterance. So the model can distinguish a transcript from the next utterance.
- "text": ``BOS text EOS``
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llama_mimi.audio.mimi import load_codec_config
from llama_mimi.common.choices import Architecture, VocabularyKind
from llama_mimi.common.hub import load_pretrained
from llama_mimi.tokens.vocabulary import AUDIO_START, AudioVocabulary, audio_tokenizer, extend_tokenizer, text_ids

IGNORE_INDEX = -100  # default of PyTorch and TorchTitan
NO_TOKEN = -1  # fills levels 1 to Q - 1 at text positions
Batch = tuple[dict[str, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class SpeechTokenizer:
    """Tokenizer for clips. A position has one id (flattened) or Q ids, one for each level (hierarchical)."""

    text_tokenizer: PreTrainedTokenizerBase
    vocabulary: AudioVocabulary
    architecture: Architecture = "flattened"

    @property
    def ids_per_position(self) -> int:
        """W: number of ids that the model reads and predicts at each position."""
        return 1 if self.architecture == "flattened" else self.vocabulary.num_quantizers

    @property
    def positions_per_frame(self) -> int:
        return self.vocabulary.num_quantizers // self.ids_per_position

    def batch(self, inputs_BLW: torch.Tensor, labels_BLW: torch.Tensor, tasks_BL: torch.Tensor) -> Batch:
        """For a training step, return the inputs of the model by name, and the labels.

        A label is a target id, or `IGNORE_INDEX`. If a position belongs to task k of `data.tasks`, counted from 0, k
        times the vocabulary's size is added to the id, so that the losses of the tasks can be logged separately.
        """
        labelled_BLW = labels_BLW + self.vocabulary.size * tasks_BL[..., None] * (labels_BLW != IGNORE_INDEX)
        if self.architecture == "flattened":
            return {"input": inputs_BLW[..., 0]}, labelled_BLW[..., 0]
        return {"input": inputs_BLW, "targets": labels_BLW}, labelled_BLW  # the depth decoder also reads the targets

    def prefix_ids(self, text: str | None = None) -> list[int]:
        """Return the ids before the audio: BOS, the transcript (task "tts") and ``<audio>``."""
        transcript = [] if text is None else text_ids(self.text_tokenizer, text)
        return [self.text_tokenizer.bos_token_id, *transcript, self.vocabulary.audio_start_id]

    def encode(self, codes_TQ: torch.Tensor, *, is_cut: bool, text: str | None = None) -> torch.Tensor:
        """Return the ids (L,) of a clip. A cut clip does not end with ``</audio>``. ``text``: transcript."""
        ids_L = self.ids(*([] if text is None else [text]), codes_TQ)
        return ids_L[:-1] if is_cut else ids_L

    def ids(self, *parts: str | torch.Tensor) -> torch.Tensor:
        """Return the flattened ids (L,) of a sequence: BOS, then texts and complete clips (codes (T, Q)) in order."""
        vocabulary, ids = self.vocabulary, [torch.tensor([self.text_tokenizer.bos_token_id])]
        for part in parts:
            if isinstance(part, str):
                ids.append(torch.tensor(text_ids(self.text_tokenizer, part), dtype=torch.long))
            else:
                start, end = torch.tensor([[vocabulary.audio_start_id], [vocabulary.audio_end_id]])
                ids += [start, vocabulary.ids_from_codes(part), end]
        return torch.cat(ids)

    @cached_property
    def adds_bos(self) -> bool:
        """True if the tokenizer adds BOS to a text, as the tokenizers of released checkpoints do."""
        return self.text_tokenizer(AUDIO_START).input_ids[0] == self.text_tokenizer.bos_token_id


@lru_cache(maxsize=4)
def load_speech_tokenizer(
    tokenizer_name: str,
    codec_name: str,
    num_quantizers: int,
    vocabulary: VocabularyKind = "llama",
    architecture: Architecture = "flattened",
) -> SpeechTokenizer:
    """Load a tokenizer (hub id or folder), and add a codec's audio tokens if these tokens are missing."""
    codebook_size = load_codec_config(codec_name, num_quantizers).codebook_size
    tokenizer = load_pretrained(AutoTokenizer, tokenizer_name, what="tokenizer")
    if vocabulary == "audio":
        tokenizer = audio_tokenizer(tokenizer)
    return SpeechTokenizer(*extend_tokenizer(tokenizer, codebook_size, num_quantizers), architecture)


def build_speech_tokenizer(job_config: Any) -> SpeechTokenizer:
    """Load the tokenizer of a run."""
    model, codec = job_config.model, job_config.codec
    kind = model.vocabulary, model.architecture
    return load_speech_tokenizer(model.hf_assets_path, codec.name, codec.num_quantizers, *kind)
