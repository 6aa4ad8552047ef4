"""Codec codes as tokens: codes <-> token ids <-> ``<code_level>`` text.

A clip's codes_TQ are flattened frame by frame. The unit of code ``c`` at level ``q`` has the id
``base + c * Q + q``, where ``base`` is the size of the text vocabulary; ``<audio>`` and ``</audio>`` follow the
last unit. Released Llama-Mimi checkpoints use exactly this order, so it never changes.
"""

import re
from dataclasses import dataclass
from typing import Literal

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llama_mimi.common.errors import UserError

AUDIO_START = "<audio>"
AUDIO_END = "</audio>"
SPECIAL_ROLES = ("bos_token", "eos_token", "pad_token")  # the order of their ids where there is no text
VocabularyKind = Literal["llama", "audio"]
Architecture = Literal["flattened", "hierarchical"]
_UNIT_PATTERN = re.compile(r"<(\d+)_(\d+)>")


@dataclass(frozen=True)
class UnitVocabulary:
    """Arithmetic between codes and token ids; needs no tokenizer.

    Args:
        base: entries of the text vocabulary in front of the units (128,256 for Llama 3), or special tokens alone.
        codebook_size: K, codes per quantizer level (2,048 for Mimi).
        num_quantizers: Q, levels per frame.
    """

    base: int
    codebook_size: int
    num_quantizers: int

    @property
    def audio_start_id(self) -> int:
        return self.base + self.codebook_size * self.num_quantizers

    @property
    def audio_end_id(self) -> int:
        return self.audio_start_id + 1

    @property
    def size(self) -> int:
        """Entries of the whole vocabulary: text, units, ``<audio>``, ``</audio>``."""
        return self.audio_end_id + 1

    def ids_from_codes(self, codes_TQ: torch.Tensor) -> torch.Tensor:
        """Flatten codes_TQ (T, Q) frame by frame into unit ids (T * Q,), int64.

        Raises:
            ValueError: another number of levels, or a code outside ``[0, K)``.
        """
        if codes_TQ.ndim != 2 or codes_TQ.shape[1] != self.num_quantizers:
            raise ValueError(f"expected codes of shape (T, {self.num_quantizers}), got {tuple(codes_TQ.shape)}")
        codes_TQ = codes_TQ.long()
        if codes_TQ.numel() and not (0 <= codes_TQ.min() and codes_TQ.max() < self.codebook_size):
            raise ValueError(
                f"codes must lie in [0, {self.codebook_size}), got {int(codes_TQ.min())} to {int(codes_TQ.max())}"
            )
        level_Q = torch.arange(self.num_quantizers, device=codes_TQ.device)
        return (self.base + codes_TQ * self.num_quantizers + level_Q).flatten()

    def codes_from_ids(self, ids_L: torch.Tensor) -> torch.Tensor:
        """Inverse of `ids_from_codes`: unit ids (T * Q,) to codes_TQ (T, Q).

        Raises:
            ValueError: an id that is no unit, a partial frame, or levels out of order.
        """
        Q = self.num_quantizers
        if ids_L.ndim != 1 or len(ids_L) % Q:
            raise ValueError(f"{tuple(ids_L.shape)} ids are no whole frames of {Q} levels")
        if not bool(self.is_unit(ids_L).all()):
            raise ValueError("the sequence holds ids that are no audio units")
        offset_TQ = (ids_L - self.base).view(-1, Q)
        if not bool((offset_TQ % Q == torch.arange(Q, device=ids_L.device)).all()):
            raise ValueError("the levels of a frame are out of order")
        return offset_TQ // Q

    def is_unit(self, ids: torch.Tensor) -> torch.Tensor:
        """True where an id is an audio unit; any shape."""
        return (ids >= self.base) & (ids < self.audio_start_id)

    def level(self, ids: torch.Tensor) -> torch.Tensor:
        """Quantizer level of each id; only meaningful where `is_unit` holds."""
        return (ids - self.base) % self.num_quantizers

    def entries(self, ids: torch.Tensor) -> torch.Tensor:
        """Which entry of its own level each id is: its code, or K for ``</audio>``; any shape."""
        return torch.where(self.is_unit(ids), (ids - self.base) // self.num_quantizers, self.codebook_size)

    def admissible_ids(self, device: torch.device) -> torch.Tensor:
        """Return the ids (Q, K + 1) that can stand at a position of each level.

        These are its K codes and, at level 0, ``</audio>``. The last column of the other levels is -1.
        """
        level_Q1 = torch.arange(self.num_quantizers, device=device)[:, None]
        ids_QK = self.base + torch.arange(self.codebook_size, device=device) * self.num_quantizers + level_Q1
        return torch.cat([ids_QK, torch.where(level_Q1 == 0, self.audio_end_id, -1)], dim=1)

    def unit_tokens(self) -> list[str]:
        """All unit texts in id order, then ``<audio>`` and ``</audio>``: what extends the tokenizer."""
        units = [f"<{c}_{q}>" for c in range(self.codebook_size) for q in range(self.num_quantizers)]
        return [*units, AUDIO_START, AUDIO_END]


def text_from_codes(codes_TQ: torch.Tensor) -> str:
    """The form people read and tokenizers parse: ``<audio><c_0><c_1>...</audio>``."""
    units = "".join(f"<{code}_{level}>" for frame in codes_TQ.tolist() for level, code in enumerate(frame))
    return f"{AUDIO_START}{units}{AUDIO_END}"


def codes_from_text(text: str, num_quantizers: int) -> torch.Tensor:
    """Inverse of `text_from_codes`: codes_TQ (T, Q), int64.

    Raises:
        ValueError: a partial frame or levels out of order.
    """
    units = [(int(code), int(level)) for code, level in _UNIT_PATTERN.findall(text)]
    levels = [level for _, level in units]
    if levels != list(range(num_quantizers)) * (len(units) // num_quantizers):
        raise ValueError(f"the text holds no whole frames of {num_quantizers} ordered levels")
    return torch.tensor([code for code, _ in units], dtype=torch.long).view(-1, num_quantizers)


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenise a text as plain text: strings such as ``<audio>`` or ``<5_0>`` in it become ordinary text tokens.

    ``split_special_tokens=True`` would still match the audio tokens, which are added tokens but not special ones.
    """
    backend = tokenizer.backend_tokenizer
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    words = [text]
    if backend.pre_tokenizer is not None:
        words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    return [token.id for word in words for token in backend.model.tokenize(word)]


def has_text(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether anything but its special tokens and units is in a tokenizer."""
    return tokenizer.get_vocab().get("<0_0>", len(tokenizer)) > len(set(_special_tokens(tokenizer).values()))


def audio_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """What is left of a Llama tokenizer without text: BOS, EOS and padding as far as it has them, units to come.

    Strings and roles stay, and so does whether BOS is put in front. Text is no longer tokenized but an exception.
    One that has no text already is returned as it is, with its units.
    """
    if not has_text(tokenizer):
        return tokenizer
    roles = _special_tokens(tokenizer)
    ids = {token: index for index, token in enumerate(dict.fromkeys(roles.values()))}
    small = Tokenizer(models.WordLevel(ids, unk_token=""))
    small.decoder = decoders.Fuse()  # no spaces between units
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
) -> tuple[PreTrainedTokenizerBase, UnitVocabulary]:
    """Append the units to a tokenizer, or recognise one that has them already.

    Returns:
        The tokenizer (changed in place) and the vocabulary it now holds.

    Raises:
        UserError: the tokenizer holds units of another depth or codebook size.
    """
    ids = tokenizer.get_vocab()
    start_id = ids.get(AUDIO_START)
    if start_id is None:
        vocabulary = UnitVocabulary(len(tokenizer), codebook_size, num_quantizers)
        # Not normalised and not split, so that the text form of a clip tokenizes to the arithmetic ids.
        tokens = [AddedToken(token, normalized=False, special=False) for token in vocabulary.unit_tokens()]
        tokenizer.add_tokens(tokens)
        return tokenizer, vocabulary
    vocabulary = UnitVocabulary(start_id - codebook_size * num_quantizers, codebook_size, num_quantizers)
    first, last = "<0_0>", f"<{codebook_size - 1}_{num_quantizers - 1}>"
    if (len(tokenizer), ids.get(first), ids.get(last)) != (vocabulary.size, vocabulary.base, start_id - 1):
        raise UserError(
            f"the tokenizer '{tokenizer.name_or_path}' already holds audio units, but not those of {num_quantizers} "
            f"quantizers with {codebook_size} codes; use the codec and num_quantizers it was extended for, or extend "
            "the base tokenizer anew with scripts/prepare_base_model.py"
        )
    return tokenizer, vocabulary
