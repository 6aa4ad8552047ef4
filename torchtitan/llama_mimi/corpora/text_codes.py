"""Read codes that are stored as text, in one of two layouts.

"tokens": a row is a clip, ``<audio><c_q>...</audio>`` (see `llama_mimi.tokens.vocabulary`).

"soda": a row is a recording in SODA's corpora (arXiv 2602.16687), without the spaces and newlines of this example::

    <|begin_of_text|>
    <|text_start|> first transcript <|text_end|> <|audio_start|> codes of the first utterance <|audio_end|>
    <|text_start|> second transcript <|text_end|> ...
    <|end_of_text|>

The code c at level q is the character ``0xE000 + K * q + c``, for K codes per level. Characters above 0xF8FF are
outside the private use area, and Unicode normalisation changes some of them. Each recording has two rows: the text is
first in row ``<id>_type1``, and the audio is first in row ``<id>_type2``. Sources: audio_vocab.py and
preprocess_audio.py in experiments/audio of the repository potsawee/marin; pretraining-data/prepare_pretraining_data.py
and emilia-mimi/process_shard.py in potsawee/tokenize-audio. The published corpora were not read.
"""

import hashlib
import re

import numpy as np

from llama_mimi.audio.mimi import load_codec_config
from llama_mimi.common.errors import UserError
from llama_mimi.corpora.clips import HASH_BYTES, CodedClip, SkippedClip
from llama_mimi.corpora.formats import open_source
from llama_mimi.corpora.options import ImportOptions
from llama_mimi.corpora.source import Row

TEXT = r"<\|text_start\|>((?:(?!<\|text_).)*)<\|text_end\|>"
UTTERANCE = re.compile(TEXT + r"<\|audio_start\|>([^<]*)<\|audio_end\|>", re.DOTALL)
CLIP = re.compile(r"<audio>((?:<\d{1,9}_\d{1,9}>)*)</audio>")


class CodesReader:
    """Reader that turns rows into clips of codes. It raises a `UserError` if the corpus lacks the column of codes."""

    def __init__(self, options: ImportOptions) -> None:
        roles = {"codes": options.codes_column, "text": options.text_column, "speaker": options.speaker_column}
        self.splits = options.layout == "soda"  # a row is a recording with several clips
        if self.splits:  # the id of a recording is stored as the speaker of its utterances
            roles |= {"text": options.codes_column, "speaker": "id"}
        self.source = open_source(options.corpus, None, "", None, roles, options.split)
        if "codes" not in self.source.columns:
            problem = f"the dataset '{options.corpus}' lacks the column '{options.codes_column}'"
            raise UserError(f"{problem}; set --codes_column to the column with codes")
        config = load_codec_config(options.codec, options.num_quantizers)
        self.num_quantizers, self.codebook_size = options.num_quantizers, config.codebook_size
        self.sliding_window = options.codec_sliding_window
        self._frame_seconds = config.frame_size / config.sampling_rate

    def clips(self, row: Row) -> list[CodedClip | SkippedClip]:
        """Return the clips of a row, or one skipped clip with a reason."""
        name, content, speaker = row["name"], row.get("codes") or "", row.get("speaker")
        if self.splits and name.endswith("_type2"):
            return [SkippedClip("second row of a recording", name, is_filtered=True)]
        try:
            if row.get("problem"):
                raise ValueError(row["problem"])
            if self.splits:
                clips, speaker = self._parse_recording(content), name.removesuffix("_type1")
            else:
                clips = [(row.get("text"), self._parse_clip(content))]
        except ValueError as error:
            return [SkippedClip("unusable codes", f"'{name}' cannot be used: {error}")]
        coded: list[CodedClip | SkippedClip] = []
        for number, (text, codes_TQ) in enumerate(clips):
            clip_name = f"{name}_{number:05d}" if self.splits else name
            code_hash = hashlib.blake2b(codes_TQ.tobytes(), digest_size=HASH_BYTES).digest()
            seconds = len(codes_TQ) * self._frame_seconds
            coded.append(CodedClip(clip_name, codes_TQ, seconds, False, text, speaker, audio_hash=code_hash))
        return coded

    def _parse_clip(self, content: str) -> np.ndarray:
        if (match := CLIP.fullmatch(content.strip())) is None:
            raise ValueError("its content is not <audio><c_q>...</audio>")
        codes_N, levels_N = np.array(re.findall(r"\d+", match[1]), dtype=np.int64).reshape(-1, 2).T
        return self._frames(levels_N, codes_N)

    def _parse_recording(self, content: str) -> list[tuple[str | None, np.ndarray]]:
        """Return the transcript and the codes (T, Q) of each utterance."""
        utterances = UTTERANCE.findall(content)
        if not utterances or UTTERANCE.sub("", content) not in ("", "<|begin_of_text|><|end_of_text|>"):
            raise ValueError("its content is not a sequence of transcripts and codes")
        clips = []
        for text, characters in utterances:
            tokens_N = np.frombuffer(characters.encode("utf-32-le"), "<u4").astype(np.int64) - 0xE000
            clips.append((text.strip() or None, self._frames(*np.divmod(tokens_N, self.codebook_size))))
        return clips

    def _frames(self, levels_N: np.ndarray, codes_N: np.ndarray) -> np.ndarray:
        """Return codes (T, Q) as uint16; raise a ValueError for wrong levels, codes or numbers of codes."""
        N, Q, K = len(codes_N), self.num_quantizers, self.codebook_size
        if len(wrong := np.flatnonzero(levels_N != np.arange(N) % Q)):
            raise ValueError(f"code {wrong[0]} has level {levels_N[wrong[0]]} instead of {wrong[0] % Q}")
        if N % Q or not N:
            raise ValueError(f"a clip of {N} codes does not have one or more whole frames of {Q} levels")
        if codes_N.max() >= K:
            raise ValueError(f"the code {codes_N.max()} is outside the codebook of {K} codes")
        return codes_N.reshape(-1, Q).astype(np.uint16)
