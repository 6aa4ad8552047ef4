"""Read codes that are stored as text, in one of two layouts.

"tokens": a row is a clip, ``<audio><c_q>...</audio>`` (see `llama_mimi.tokens.vocabulary.text_from_codes`).

"soda": a row is a recording in SODA's corpora (arXiv 2602.16687), without the spaces and newlines of this example::

    <|begin_of_text|>
    <|text_start|> first transcript <|text_end|> <|audio_start|> codes of the first utterance <|audio_end|>
    <|text_start|> second transcript <|text_end|> ...
    <|end_of_text|>

The code c at level q is the character ``0xE000 + K * q + c``, for K codes per level. Characters above 0xF8FF are
outside the private use area, and Unicode normalisation changes some of them. Each recording has two rows: the text is
first in row ``<id>_type1``, and the audio is first in row ``<id>_type2``. Sources: audio_vocab.py and
preprocess_audio.py in experiments/audio of the repository potsawee/marin; pretraining-data/prepare_pretraining_data.py
and emilia-mimi/process_shard.py in potsawee/tokenize-audio. No file of the published corpora was read.
"""

import hashlib
import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from llama_mimi.audio.mimi import load_codec_config
from llama_mimi.common.errors import UserError
from llama_mimi.corpora.clips import HASH_BYTES, SkippedClip
from llama_mimi.corpora.code_shards import CodedClip
from llama_mimi.corpora.formats import open_source
from llama_mimi.corpora.options import ImportOptions
from llama_mimi.corpora.source import Row, Source

UTTERANCE = re.compile(r"<\|text_start\|>(.*?)<\|text_end\|><\|audio_start\|>([^<]*)<\|audio_end\|>", re.DOTALL)
CLIP = re.compile(r"<audio>((?:<\d{1,9}_\d{1,9}>)*)</audio>")


class StatedCodec(NamedTuple):
    """Properties of the codec that computed the codes, according to the user."""

    num_quantizers: int
    codebook_size: int
    frame_seconds: float
    sliding_window: bool | Literal["unknown"]


@dataclass(frozen=True)
class CodesReader:
    """Reader that turns the rows of a source into clips of codes."""

    source: Source
    codec: StatedCodec
    splits: bool  # True for "soda": a row is a recording with several clips

    def clips(self, row: Row) -> list[CodedClip | SkippedClip]:
        """Return the clips of a row, or one skipped clip with a reason."""
        name, content, speaker = row["name"], row.get("codes") or "", row.get("speaker")
        if self.splits and name.endswith("_type2"):
            return [SkippedClip("second row of a recording", name, is_filtered=True)]
        try:
            if row.get("problem"):
                raise ValueError(row["problem"])
            if self.splits:
                clips, speaker = parse_recording(content, self.codec), name.removesuffix("_type1")
            else:
                clips = [(row.get("text"), parse_clip(content, self.codec))]
        except ValueError as error:
            return [SkippedClip("unusable codes", f"'{name}' cannot be used: {error}")]
        coded: list[CodedClip | SkippedClip] = []
        for number, (text, codes_TQ) in enumerate(clips):
            clip_name = f"{name}_{number:05d}" if self.splits else name
            code_hash = hashlib.blake2b(codes_TQ.tobytes(), digest_size=HASH_BYTES).digest()
            seconds = len(codes_TQ) * self.codec.frame_seconds
            coded.append(CodedClip(clip_name, codes_TQ, seconds, False, text, speaker, audio_hash=code_hash))
        return coded


def parse_clip(content: str, codec: StatedCodec) -> np.ndarray:
    """Return the codes (T, Q) of a clip in the layout "tokens"; raise a ValueError for another layout."""
    if (match := CLIP.fullmatch(content.strip())) is None:
        raise ValueError("its content is not <audio><c_q>...</audio>")
    codes_N, levels_N = np.array(re.findall(r"\d+", match[1]), dtype=np.int64).reshape(-1, 2).T
    return _frames(levels_N, codes_N, codec)


def parse_recording(content: str, codec: StatedCodec) -> list[tuple[str | None, np.ndarray]]:
    """Return each transcript and its codes (T, Q) in the layout "soda"; raise a ValueError for another layout."""
    utterances = UTTERANCE.findall(content)
    if not utterances or UTTERANCE.sub("", content) not in ("", "<|begin_of_text|><|end_of_text|>"):
        raise ValueError("its content is not a sequence of transcripts and codes")
    clips: list[tuple[str | None, np.ndarray]] = []
    for text, characters in utterances:
        tokens_N = np.frombuffer(characters.encode("utf-32-le"), "<u4").astype(np.int64) - 0xE000
        clips.append((text.strip() or None, _frames(*np.divmod(tokens_N, codec.codebook_size), codec)))
    return clips


def _frames(levels_N: np.ndarray, codes_N: np.ndarray, codec: StatedCodec) -> np.ndarray:
    """Return codes (T, Q) as uint16; raise a ValueError for wrong levels, codes or numbers of codes."""
    N, Q, K = len(codes_N), codec.num_quantizers, codec.codebook_size
    if len(wrong := np.flatnonzero(levels_N != np.arange(N) % Q)):
        raise ValueError(f"code {wrong[0]} has level {levels_N[wrong[0]]} instead of {wrong[0] % Q}")
    if N % Q or not N:
        raise ValueError(f"a clip of {N} codes does not have one or more whole frames of {Q} levels")
    if codes_N.max() >= K:
        raise ValueError(f"the code {codes_N.max()} is outside the codebook of {K} codes")
    return codes_N.reshape(-1, Q).astype(np.uint16)


def open_codes(options: ImportOptions) -> tuple[CodesReader, StatedCodec]:
    """Open a corpus of codes; raise a `UserError` if it does not exist or lacks the column of codes."""
    roles = {"codes": options.codes_column, "text": options.text_column, "speaker": options.speaker_column}
    if is_soda := options.layout == "soda":  # the utterances of a recording are stored as those of one speaker
        roles |= {"text": options.codes_column, "speaker": "id"}
    source = open_source(options.corpus, None, "", None, roles, options.split)
    if "codes" not in source.columns:
        problem = f"the dataset '{options.corpus}' lacks the column '{options.codes_column}'"
        raise UserError(f"{problem}; set --codes_column to the column with codes")
    config = load_codec_config(options.codec, options.num_quantizers)
    sizes = options.num_quantizers, config.codebook_size, config.frame_size / config.sampling_rate
    codec = StatedCodec(*sizes, options.codec_sliding_window)
    return CodesReader(source, codec, is_soda), codec
