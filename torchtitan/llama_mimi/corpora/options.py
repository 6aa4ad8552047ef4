"""Options of scripts/tokenize_corpus.py and scripts/import_codes.py. This module does not import PyTorch."""

import math
from dataclasses import dataclass
from typing import Literal

from llama_mimi.common.choices import DEFAULT_CODEC, Precision
from llama_mimi.common.errors import UserError


@dataclass(kw_only=True)
class ShardOptions:
    """Options of both scripts."""

    corpus: str  # name of a corpus, hf:owner/name, or path (file, folder or glob) of Parquet, tar, audio or JSONL files
    output_dir: str  # folder for the shards; a local path or a URL that fsspec supports
    split: str | None = None  # split to read, if the corpus has several splits
    codec: str = DEFAULT_CODEC  # hub id or folder of the codec
    num_quantizers: int = 8  # number of quantizer levels to store; training may use fewer levels
    text_column: str = "text"  # name of the column with transcripts (stored if the column exists)
    speaker_column: str = "speaker"  # name of the column with speakers (stored if the column exists)
    # minimum number of rows in a shard (exact number for tar files); default: 2048, but at most 1/64 of all rows
    clips_per_shard: int | None = None
    num_workers: int = 2  # number of processes (on each rank) that read the rows
    duplicates: Literal["keep", "drop"] = "keep"  # 'drop' skips a clip if an earlier clip has the same samples or codes
    max_skip_fraction: float = 0.01  # maximum fraction of unusable clips; the command stops if more clips are unusable

    def __post_init__(self) -> None:
        if self.clips_per_shard is not None and self.clips_per_shard < 1:
            raise UserError(f"--clips_per_shard is {self.clips_per_shard}; it must be a positive number")
        if not 0 <= self.max_skip_fraction <= 1:
            raise UserError(f"--max_skip_fraction is {self.max_skip_fraction}; it must be a fraction between 0 and 1")


@dataclass(kw_only=True)
class TokenizationOptions(ShardOptions):
    """Options of scripts/tokenize_corpus.py."""

    dataset_path: str | None = None  # folder of the downloaded corpus, if --corpus is a name
    dtype: Precision = "float32"  # precision of the codec; bfloat16 changes about 2 % of the codes
    codec_sliding_window: bool = True  # limit the codec's attention to its sliding window
    audio_column: str = "audio"  # name of the column with audio
    max_audio_seconds: float = 120.0  # maximum length of a clip, in seconds; see --long_recordings
    # 'cut' drops the audio after --max_audio_seconds; 'split' divides a recording at pauses, and drops its text
    long_recordings: Literal["cut", "split"] = "cut"
    min_seconds: float = 0.0  # minimum length of a clip, in seconds; shorter clips are skipped
    max_seconds: float | None = None  # maximum length of a clip, in seconds; longer clips are skipped
    where: str | None = None  # condition on the rows to tokenise, such as 'language == "en" and dnsmos >= 3'

    def __post_init__(self) -> None:
        super().__post_init__()
        shortest, longest, limit = self.min_seconds, self.max_seconds, self.max_audio_seconds
        if not 0 < limit < math.inf:
            raise UserError(f"--max_audio_seconds is {limit}; it must be a positive number")
        if longest is not None and self.long_recordings == "split":
            raise UserError("--max_seconds skips long recordings, but --long_recordings is 'split'; remove one flag")
        for name, value, lowest in (("min_seconds", shortest, 0), ("max_seconds", longest, shortest)):
            if value is not None and not lowest <= value <= limit:
                needed = f"between {lowest:g} and {limit:g} (--max_audio_seconds)"
                raise UserError(f"--{name} is {value:g}; it must be {needed}")


@dataclass(kw_only=True)
class ImportOptions(ShardOptions):
    """Options of scripts/import_codes.py."""

    # text form of the codes: 'soda' (one character for each code) or 'tokens' (<audio><c_q>...</audio>)
    layout: Literal["soda", "tokens"]
    # setting of the codec when the codes were computed; with 'unknown', training accepts any codec.sliding_window
    codec_sliding_window: Literal[True, False, "unknown"]
    codes_column: str = "codes"  # name of the column with codes ('text' in SODA's corpora)
