"""The three benchmark scripts: flags, and the way from a source to scores."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from llama_mimi.audio.mimi import CodecAttention, codec_hash, whole_frames
from llama_mimi.common.errors import UserError
from llama_mimi.common.files import write_atomically
from llama_mimi.common.hub import weights_sha256
from llama_mimi.common.ranks import Ranks, from_first, torchrun_ranks
from llama_mimi.common.resume import ProgressLog
from llama_mimi.common.versions import versions
from llama_mimi.evaluation.benchmarks import (
    SALMON_PARTS,
    Benchmark,
    limited,
    read_salmon,
    read_slm21,
    read_storycloze,
)
from llama_mimi.evaluation.clip_codes import CodeCache, cache_key, encode_clips
from llama_mimi.evaluation.clip_scores import score_clips
from llama_mimi.evaluation.results import (
    FORMAT,
    MAX_AUDIO_SECONDS,
    check_earlier,
    codes_sha256,
    log_key,
    model_folder,
    results,
    summary,
    write_submissions,
)
from llama_mimi.evaluation.scoring import (
    Likelihood,
    Preset,
    PresetName,
    Statistic,
    check_model,
    preset,
    with_options,
)
from llama_mimi.generation.loading import load_speech_model
from llama_mimi.generation.speech_model import DecoderPrecision

BATCH_TOKENS = (4096, 32768)  # without and with a GPU


@dataclass(frozen=True)
class EvaluationOptions:
    """Flags of the scripts in eval/."""

    model_name: str = "llm-jp/Llama-Mimi-1.3B"
    """Hub id or folder"""

    data_dir: str | None = None
    """Official layout, Parquet, or a hub id; by default where the benchmark lies on the hub"""

    output_dir: Path = Path("results")

    codes_dir: str | None = None
    """Codes of clips, kept for other runs; by default <output_dir>/codes"""

    codec: str | None = None
    """Hub id or folder; by default what the model names"""

    codec_attention: CodecAttention | None = None
    """By default that of the model's training codes"""

    device: str | None = None
    """By default the accelerator where there is one"""

    dtype: DecoderPrecision = "float32"
    """Precision of the decoder; the first release evaluates in float16"""

    batch_tokens: int | None = None
    """Tokens of a batch, with padding; by default what suits the device"""

    max_audio_seconds: float = MAX_AUDIO_SECONDS
    """Longer clips are cut, and counted"""

    preset: PresetName = "official"
    """The benchmark's own rule, or what the first release of Llama-Mimi computes"""

    levels: str | None = None
    """Quantizer levels to score: all, or 0, or 0,1. This and the next flags are named in the result file"""

    end_token: Literal["in", "out"] | None = None
    """Score </audio> or not"""

    statistic: Statistic | None = None
    """What is taken of the log-likelihoods of a clip's tokens"""

    window_seconds: float | None = None
    """Score the least likely window of this length"""

    likelihood: Likelihood | None = None
    """softmax over the whole vocabulary (the presets'), or grammar: over the tokens that can stand at a position"""

    limit: int | None = None
    """Score only so many pairs of each part (words or sentences, where those have several), for a quick look"""

    def chosen_preset(self, levels: tuple[int, ...] | None) -> Preset:
        """The scoring that the flags ask for.

        Args:
            levels: that the benchmark's presets score; None is all.

        Raises:
            UserError: flags that are out of range or do not go together.
        """
        for name, value in {"max_audio_seconds": self.max_audio_seconds, "batch_tokens": self.batch_tokens}.items():
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"--{name} is {value}; it must be a positive number")
        if self.preset == "original" and self.max_audio_seconds != MAX_AUDIO_SECONDS:
            raise UserError(f"--preset original cuts at {MAX_AUDIO_SECONDS:g} s; leave out --max_audio_seconds")
        if self.preset == "original" and self.codec_attention == "windowed":
            raise UserError("--preset original encodes without the codec's window; leave out --codec_attention")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"--limit is {self.limit}; it must be 1 or more")
        chosen = with_options(
            preset(self.preset, levels),
            levels=self.levels,
            end_token=None if self.end_token is None else self.end_token == "in",
            statistic=self.statistic,
            window_seconds=self.window_seconds,
            likelihood=self.likelihood,
        )
        return chosen if self.limit is None else replace(chosen, name=f"{chosen.name}-limit_{self.limit}")


@dataclass(frozen=True)
class BenchmarkScript:
    """One of the scripts in eval/.

    Args:
        name: of the benchmark, and of its folder of results.
        hub_source: read when no ``--data_dir`` is given.
        read: a reader of `llama_mimi.evaluation.benchmarks`.
        levels: that both presets score; None is all.
        mean_of: parts whose mean is the benchmark's one number, where it has one.
    """

    name: str
    hub_source: str
    read: Callable[[str], Benchmark]
    levels: tuple[int, ...] | None
    mean_of: Sequence[str] = ()

    def run(self, options: EvaluationOptions) -> None:
        """Score and report.

        Raises:
            UserError: a flag, the data or the model cannot be used.
        """
        chosen = options.chosen_preset(self.levels)
        with torchrun_ranks(options.device) as ranks:
            try:
                self._evaluate(options, chosen, ranks)
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"the memory of '{ranks.device}' is full; lower --batch_tokens, or score in --dtype bfloat16"
                ) from error

    def result_path(self, options: EvaluationOptions) -> Path:
        """Where the result of these flags lies; its name says what of the scoring is not the preset's.

        Raises:
            UserError: as `EvaluationOptions.chosen_preset`.
        """
        name = options.chosen_preset(self.levels).name
        return options.output_dir / self.name / model_folder(options.model_name) / f"{name}.json"

    def _evaluate(self, options: EvaluationOptions, chosen: Preset, ranks: Ranks) -> None:
        data_dir = options.data_dir or self.hub_source
        benchmark = self.read(data_dir)
        if options.limit is not None:
            benchmark = limited(benchmark, options.limit)
        model = load_speech_model(
            options.model_name,
            codec_name=options.codec,
            attention="whole" if chosen.scoring.as_released else options.codec_attention,
            device=str(ranks.device),
            dtype=options.dtype,
        )
        whole_frames(options.max_audio_seconds, model.codec.config, "--max_audio_seconds")
        check_model(chosen.scoring, model.codec.num_quantizers, has_release=model.has_release)
        header = {
            "format": FORMAT,
            "benchmark": self.name,
            "preset": chosen.name,
            "model": options.model_name,
            "model_sha256": from_first(lambda: weights_sha256(options.model_name)),
            "data": data_dir,
            "scoring": chosen.describe(),
            "num_quantizers": model.codec.num_quantizers,
            "codec": {
                "name": model.codec.name,
                "sha256": codec_hash(model.codec.name),
                "attention": model.codec.attention,
            },
            "settings": {
                "dtype": options.dtype,
                "device": ranks.device.type,
                "batch_tokens": options.batch_tokens or BATCH_TOKENS[ranks.device.type == "cuda"],
                "max_audio_seconds": options.max_audio_seconds,
            },
            "versions": versions(),
        }
        path = self.result_path(options)
        replaced = from_first(lambda: check_earlier(path, header))

        clips = benchmark.clips
        as_released = chosen.scoring.as_released
        codes_dir = options.codes_dir or str(options.output_dir / "codes")
        cache = CodeCache(codes_dir, cache_key(model.codec, options.max_audio_seconds, as_released=as_released))
        audio_ids, codes = encode_clips(
            model.codec, clips, cache, ranks, options.max_audio_seconds, as_released=as_released
        )
        header["audio_sha256"] = hashlib.sha256("".join(audio_ids).encode()).hexdigest()
        header["codes_sha256"] = codes_sha256(audio_ids, codes)
        log = ProgressLog(path.with_suffix(".partial"), log_key(header, adds_bos=model.sequences.adds_bos))
        scores = score_clips(model, codes, chosen.scoring, header["settings"]["batch_tokens"], log, ranks)
        if ranks.rank == 0:
            report = header | results(benchmark, audio_ids, codes, scores, chosen, self.mean_of)
            content = json.dumps(report, indent=1, allow_nan=False) + "\n"
            write_atomically(str(path.parent), path.name, content.encode())
            submissions = write_submissions(
                path.with_name(f"{chosen.name}_submission"), clips, [scores[audio_id] for audio_id in audio_ids]
            )
            log.close()
            for line in [*summary(report), *submissions, *replaced, f"written to {path}"]:
                print(line)


SALMON = BenchmarkScript("salmon", "slprl/SALMon", read_salmon, levels=None, mean_of=SALMON_PARTS)
SLM21 = BenchmarkScript("sLM21", "speed", read_slm21, levels=(0,))
STORYCLOZE = BenchmarkScript("sStoryCloze", "speed", read_storycloze, levels=(0,))
BENCHMARK_SCRIPTS = {script.name: script for script in (SALMON, SLM21, STORYCLOZE)}
