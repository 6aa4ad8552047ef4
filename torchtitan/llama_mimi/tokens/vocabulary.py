"""Conversion of codec codes to token ids and to text such as ``<5_0>`` (code 5 at level 0), and back.

The codes of a clip are flattened frame by frame. The audio token of code ``c`` at level ``q`` has the id
``base + c * Q + q``, where ``base`` is the size of the text vocabulary. ``<audio>`` and ``</audio>`` have the
last two ids. Do not change this numbering, because released Llama-Mimi checkpoints depend on it.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llama_mimi.common.errors import UserError

AUDIO_START, AUDIO_END = "<audio>", "</audio>"
SPECIAL_ROLES = ("bos_token", "eos_token", "pad_token")  # in the order of their ids in a tokenizer without text


@dataclass(frozen=True)
class AudioVocabulary:
    """Mapping between codes and token ids, computed without a tokenizer."""

    base: int  # number of entries before the audio tokens: text (128,256 for Llama 3), or special tokens only
    codebook_size: int  # K, codes per quantizer level (2,048 for Mimi)
    num_quantizers: int  # Q, levels per frame

    @property
    def audio_start_id(self) -> int:
        return self.base + self.codebook_size * self.num_quantizers

    @property
    def audio_end_id(self) -> int:
        return self.audio_start_id + 1

    @property
    def size(self) -> int:
        """Number of entries: text, audio tokens, ``<audio>`` and ``</audio>``."""
        return self.audio_end_id + 1

    def ids_from_codes(self, codes_TQ: torch.Tensor) -> torch.Tensor:
        """Return the ids (T * Q,) of codes (T, Q), frame by frame, as int64."""
        if codes_TQ.ndim != 2 or codes_TQ.shape[1] != self.num_quantizers:
            raise ValueError(f"expected codes of shape (T, {self.num_quantizers}), got {tuple(codes_TQ.shape)}")
        codes_TQ = codes_TQ.long()
        if codes_TQ.numel() and not (0 <= codes_TQ.min() and codes_TQ.max() < self.codebook_size):
            found = f"{int(codes_TQ.min())} to {int(codes_TQ.max())}"
            raise ValueError(f"expected codes in [0, {self.codebook_size}), got {found}")
        level_Q = torch.arange(self.num_quantizers, device=codes_TQ.device)
        return (self.base + codes_TQ * self.num_quantizers + level_Q).flatten()

    def is_audio(self, ids: torch.Tensor) -> torch.Tensor:
        """Return a mask of ids; True for audio tokens."""
        return (ids >= self.base) & (ids < self.audio_start_id)

    def level(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the quantizer level of each id; valid only for audio tokens."""
        return (ids - self.base) % self.num_quantizers

    def entries(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the entry (index within a level) of each id: the code of an audio token, or K for ``</audio>``."""
        return torch.where(self.is_audio(ids), (ids - self.base) // self.num_quantizers, self.codebook_size)

    def admissible_ids(self, device: torch.device) -> torch.Tensor:
        """Return the valid ids (Q, K + 1) of each level: K codes, then ``</audio>`` (level 0) or -1 (other levels)."""
        level_Q1 = torch.arange(self.num_quantizers, device=device)[:, None]
        ids_QK = self.base + torch.arange(self.codebook_size, device=device) * self.num_quantizers + level_Q1
        return torch.cat([ids_QK, torch.where(level_Q1 == 0, self.audio_end_id, -1)], dim=1)


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenise plain text. Strings such as ``<audio>`` or ``<5_0>`` become ordinary text tokens.

    ``split_special_tokens=True`` is not enough: audio tokens are added to the tokenizer, but not as special tokens.
    """
    backend = tokenizer.backend_tokenizer
    if not any(character in text for character in _first_characters(tokenizer)):
        return backend.encode(text, add_special_tokens=False).ids  # the same ids, 10 times as fast
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    splitter = backend.pre_tokenizer
    words = [text] if splitter is None else [word for word, _ in splitter.pre_tokenize_str(text)]
    return [token.id for word in words for token in backend.model.tokenize(word)]


@lru_cache(maxsize=4)
def _first_characters(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Return the first characters of all added tokens, such as "<"."""
    return {token[0] for token in tokenizer.get_added_vocab()}


def has_text(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return True if a tokenizer has text tokens."""
    return tokenizer.get_vocab().get("<0_0>", len(tokenizer)) > len(set(_special_tokens(tokenizer).values()))


def audio_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return a tokenizer with only BOS, EOS and PAD. A tokenizer without text tokens is returned unchanged."""
    if not has_text(tokenizer):
        return tokenizer
    roles = _special_tokens(tokenizer)
    ids = {token: index for index, token in enumerate(dict.fromkeys(roles.values()))}
    small = Tokenizer(models.WordLevel(ids, unk_token=""))
    small.decoder = decoders.Fuse()  # no spaces between audio tokens
    bos = tokenizer.bos_token
    if tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]:
        small.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, ids[bos])]
        )
    return PreTrainedTokenizerFast(tokenizer_object=small, **roles)


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    given = tokenizer.special_tokens_map
    return {role: given[role] for role in SPECIAL_ROLES if role in given}


def extend_tokenizer(
    tokenizer: PreTrainedTokenizerBase, codebook_size: int, num_quantizers: int
) -> tuple[PreTrainedTokenizerBase, AudioVocabulary]:
    """Add audio tokens to a tokenizer in place; raise a `UserError` if it has tokens of another codec."""
    K, Q, ids = codebook_size, num_quantizers, tokenizer.get_vocab()
    if AUDIO_START not in ids:
        vocabulary = AudioVocabulary(len(tokenizer), K, Q)
        tokens = [*(f"<{code}_{level}>" for code in range(K) for level in range(Q)), AUDIO_START, AUDIO_END]
        # Not normalised, so that the text of a clip has the ids that `AudioVocabulary` computes.
        _first_characters.cache_clear()
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])
        return tokenizer, vocabulary
    vocabulary = AudioVocabulary(ids[AUDIO_START] - K * Q, K, Q)
    found = len(tokenizer), ids.get("<0_0>"), ids.get(f"<{K - 1}_{Q - 1}>")
    if found != (vocabulary.size, vocabulary.base, vocabulary.audio_start_id - 1):
        problem = f"the audio tokens of '{tokenizer.name_or_path}' do not fit {Q} quantizers with {K} codes"
        remedy = "use the codec and num_quantizers for which this tokenizer was prepared"
        raise UserError(f"{problem}; {remedy}")
    return tokenizer, vocabulary
