"""Options of the benchmark scripts in eval/. This module does not import PyTorch."""

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from llama_mimi.common.choices import DecoderPrecision
from llama_mimi.common.command_line import command
from llama_mimi.common.errors import UserError

Likelihood = Literal["softmax", "grammar"]
MAX_AUDIO_SECONDS = 20.0  # maximum length of the paper's training clips
PRIMARY = "primary"  # name of the preset's scoring rule, which decides the accuracy of a benchmark
PROMPT_RULES = ("after_prompt", "normalised")  # only for benchmarks in which both clips of a pair have the same prompt
# Only for benchmarks with transcripts: the whole clip, its prompt or its ending is text. The values are training tasks
# that the model needs.
TEXT_RULES = {"text": "text", "text_prompt": "interleaved", "text_ending": "interleaved"}
FURTHER_RULES = ("level_0", "all_levels", *PROMPT_RULES, *TEXT_RULES)


@dataclass(frozen=True)
class Scoring:
    """Scoring rule of a preset.

    Args:
        levels: quantizer levels to score; None means all. ``</audio>`` is also scored, if present.
        as_released: score as in the first release of Llama-Mimi. A sequence begins with BOS only if the tokenizer adds
            BOS. A sequence ends with ``</audio>`` even if the clip is cut. If ``levels`` is None, all tokens after the
            first are scored, including ``<audio>``. If ``levels`` is ``(0,)``, every Q-th token from position 2 is
            scored: with BOS, the codes of level 0 and ``</audio>``; without BOS, the codes of level 1. A tie counts as
            an error (else half), and the accuracy is the mean over pairs (else over groups, such as words).
        likelihood: "softmax" normalises over the vocabulary. "grammar" normalises over the codes of a level; at level
            0, ``</audio>`` is included.
    """

    levels: tuple[int, ...] | None
    as_released: bool = False
    likelihood: Likelihood = "softmax"

    @property
    def by_levels(self) -> dict[str, "Scoring"]:
        """The rules that score whole clips, by name: this rule and, for the preset "official", two sets of levels."""
        if self.as_released:
            return {PRIMARY: self}
        further = {"level_0": replace(self, levels=(0,)), "all_levels": replace(self, levels=None)}
        return {PRIMARY: self} | {name: rule for name, rule in further.items() if rule != self}


@dataclass(frozen=True)
class EvaluationOptions:
    model_name: str = "llm-jp/Llama-Mimi-1.3B"  # hub id or folder of the model
    # folder (official layout or Parquet files) or hub id of the data; default: hub id of the benchmark
    data_dir: str | None = None
    output_dir: Path = Path("results")  # folder for results
    codes_dir: str | None = None  # folder for cached codes, which all models share; default: <output_dir>/codes
    codec: str | None = None  # hub id or folder of the codec; default: the model's codec
    # run the codec with sliding-window attention; default: the setting used in training
    codec_sliding_window: bool | None = None
    device: str | None = None  # torch device; default: the GPU if there is one, else the CPU
    dtype: DecoderPrecision = "float32"  # precision of the decoder (first release of Llama-Mimi: float16)
    batch_tokens: int | None = None  # maximum number of tokens in a batch; default: 32768 on a GPU, else 4096
    max_audio_seconds: float = MAX_AUDIO_SECONDS  # maximum length of a clip, in seconds; the rest of a clip is ignored
    # scoring rule: 'official' is the benchmark's rule, 'original' is the rule of the first release of Llama-Mimi
    preset: Literal["official", "original"] = "official"
    levels: str | None = None  # quantizer levels to score: 'all' or a list such as 0,1; default: all for SALMon, else 0
    # tokens that normalise a likelihood: 'softmax' uses the whole vocabulary, 'grammar' uses only the valid tokens
    likelihood: Likelihood = "softmax"
    limit: int | None = None  # maximum number of pairs (sLM21: words or sentences) in each part; default: all

    def __post_init__(self) -> None:
        for flag in ("max_audio_seconds", "batch_tokens", "limit"):
            if (value := getattr(self, flag)) is not None and not 0 < value < math.inf:
                raise UserError(f"--{flag} is {value}; set a positive number")
        if self.levels is not None and not re.fullmatch(r"all|\d+(,\d+)*", self.levels):
            raise UserError(f"--levels is '{self.levels}'; set 'all' or a list of levels, such as 0,1")

    def scoring(self, levels: tuple[int, ...] | None) -> tuple[str, Scoring]:
        """Return the result file's name and the scoring rule. ``levels`` are the benchmark's default levels."""
        name, chosen = str(self.preset), levels
        if self.levels is not None:
            chosen = None if self.levels == "all" else tuple(sorted({int(level) for level in self.levels.split(",")}))
        if chosen != levels:
            name += "-all_levels" if chosen is None else f"-levels_{'_'.join(map(str, chosen))}"
        if self.likelihood != "softmax":
            name += f"-{self.likelihood}"
        is_changed = name != self.preset or self.max_audio_seconds != MAX_AUDIO_SECONDS
        if self.preset == "original" and (is_changed or self.codec_sliding_window):
            raise UserError(
                "--preset original does not allow --levels, --likelihood, --max_audio_seconds or "
                "--codec_sliding_window; remove these flags, or set --preset official"
            )
        if self.limit is not None:
            name += f"-limit_{self.limit}"
        return name, Scoring(chosen, self.preset == "original", self.likelihood)


def run_benchmark(name: str, doc: str | None) -> None:
    """Score a benchmark with the flags of the command line."""
    with command(EvaluationOptions, doc) as options:
        from llama_mimi.evaluation.script import BENCHMARK_SCRIPTS

        BENCHMARK_SCRIPTS[name].run(options)


def model_folder(model_name: str) -> str:
    """Return the name of a model's result folder: the last part of the model's path or hub id."""
    path = Path(model_name)
    return path.resolve().name if path.is_dir() else path.name
