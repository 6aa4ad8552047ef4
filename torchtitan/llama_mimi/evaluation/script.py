"""Implementation of the benchmark scripts, which score a benchmark and write a result file."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llama_mimi.audio.mimi import codec_hash, whole_frames
from llama_mimi.common.choices import AUDIO_TARGETS
from llama_mimi.common.command_line import REPORT, print_next
from llama_mimi.common.distributed import DistributedContext, broadcast_from_rank0, distributed_context
from llama_mimi.common.errors import UserError
from llama_mimi.common.files import is_synthetic, write_atomically
from llama_mimi.common.hub import weights_sha256
from llama_mimi.common.resume import ProgressLog
from llama_mimi.common.versions import versions
from llama_mimi.evaluation import benchmarks, results
from llama_mimi.evaluation.codes import encode_clips
from llama_mimi.evaluation.options import PRIMARY, TEXT_RULES, EvaluationOptions, model_folder
from llama_mimi.evaluation.scoring import score_clips, score_texts, shared_prompt, text_sequences
from llama_mimi.generation.loading import load_speech_model

BATCH_TOKENS = (4096, 32768)  # on a CPU, on a GPU


@dataclass(frozen=True)
class BenchmarkScript:
    name: str  # name of the benchmark and of its result folder
    hub_source: str | None  # default of --data_dir; None if the hub does not have the official data
    read: Callable[[str], benchmarks.Benchmark]
    levels: tuple[int, ...] | None  # quantizer levels that both presets score; None means all
    mean_of: Sequence[str] = ()  # parts whose mean is reported
    has_prompts: bool = False  # True if the clips of a pair begin with the same speech; scores `PROMPT_RULES`
    text_rules: Sequence[str] = ()  # rules of `TEXT_RULES` that apply if transcripts are known

    def result_path(self, options: EvaluationOptions) -> Path:
        """Return the path of the result file for ``options``; raise a `UserError` for invalid flags."""
        if (options.data_dir or self.hub_source) is None:
            raise UserError(f"--data_dir is missing; set --data_dir to a folder with {self.name} (eval/README.md)")
        name, _ = options.scoring(self.levels)
        return options.output_dir / self.name / model_folder(options.model_name) / f"{name}.json"

    def run(self, options: EvaluationOptions) -> None:
        """Score the benchmark and write the result file."""
        path = self.result_path(options)  # checks the flags before the ranks connect
        with distributed_context(options.device) as ranks:
            self._evaluate(options, path, ranks)

    def _evaluate(self, options: EvaluationOptions, path: Path, ranks: DistributedContext) -> None:
        name, scoring = options.scoring(self.levels)
        source = str(options.data_dir or self.hub_source)
        benchmark = self.read(source)
        if options.limit is not None:
            benchmark = benchmarks.limited(benchmark, options.limit)
        model = load_speech_model(
            options.model_name,
            codec_name=options.codec,
            sliding_window=False if scoring.as_released else options.codec_sliding_window,
            device=str(ranks.device),
            dtype=options.dtype,
        )
        model.require_task("the benchmark", *AUDIO_TARGETS)
        codec, max_seconds = model.codec, options.max_audio_seconds
        whole_frames(max_seconds, codec.config, "--max_audio_seconds")
        if scoring.as_released and model.tokenizer.architecture == "hierarchical":
            raise UserError("--preset original supports only flattened models; set --preset official")
        if (level := max(scoring.levels or (0,))) > (last := codec.num_quantizers - 1):
            raise UserError(f"--levels includes level {level}, but the model has levels 0 to {last}; remove this level")
        batch_tokens = options.batch_tokens or BATCH_TOKENS[ranks.device.type == "cuda"]
        settings = {"dtype": options.dtype, "device": ranks.device.type, "batch_tokens": batch_tokens}
        header = {
            "format": results.FORMAT,
            "benchmark": self.name,
            "preset": name,
            "model": options.model_name,
            "model_sha256": broadcast_from_rank0(lambda: weights_sha256(options.model_name)),
            "data": source,
            "data_kind": "synthetic" if is_synthetic(source) else "other",
            "scoring": vars(scoring),
            "num_quantizers": codec.num_quantizers,
            "codec": {"name": codec.name, "sha256": codec_hash(codec.name), "sliding_window": codec.sliding_window},
            "settings": {**settings, "max_audio_seconds": max_seconds},
            "versions": versions(),
        }
        broadcast_from_rank0(lambda: results.check_earlier(path, header))

        clips = benchmark.clips
        codes_dir = options.codes_dir or str(options.output_dir / "codes")
        audio_ids, codes = encode_clips(codec, clips, codes_dir, ranks, max_seconds, as_released=scoring.as_released)
        coded = [codes[audio_id] for audio_id in audio_ids]
        prompts: list[int | None] = [None] * len(clips)
        if self.has_prompts and not scoring.as_released:
            both = zip(coded[::2], coded[1::2], strict=True)
            prompts = [shared_prompt(one.codes_TQ, other.codes_TQ) for one, other in both for _ in range(2)]
        # The log stays valid after a new commit.
        log_key = {**header, "versions": versions() | {"commit": ""}, "adds_bos": model.tokenizer.adds_bos}
        log = ProgressLog(path.with_suffix(".partial"), log_key)
        names = list(zip(audio_ids, prompts, strict=True))
        scores = score_clips(model, codes, names, scoring, batch_tokens, log, ranks)
        rules = [rule for rule in self.text_rules if TEXT_RULES[rule] in model.tasks]
        if scoring.as_released or scoring.likelihood != "softmax":  # text needs the softmax over the whole vocabulary
            rules = []
        if rules:
            sequences = [text_sequences(model, *both, scoring, rules) for both in zip(clips, coded, strict=True)]
            texts = score_texts(model, sequences, batch_tokens, log, ranks)
            scores = [of_clip | of_text for of_clip, of_text in zip(scores, texts, strict=True)]
        for rule in rules:
            num_clips = 2 * len(benchmark.pairs)  # without the unpaired clips, which follow
            if missing := sum(rule not in of_clip for of_clip in scores[:num_clips]):
                problem = f"{missing:,} of {num_clips:,} clips lack a transcript, or the time of the ending"
                benchmark.notes.append(f"rule {rule.replace('_', ' ')}: {problem} (see eval/README.md)")
        if ranks.rank > 0:
            return
        codes_of_clips = (clip.codes_TQ.astype("int32").tobytes() for clip in coded)
        report = {
            **header,
            "audio_sha256": hashlib.sha256("".join(audio_ids).encode()).hexdigest(),
            "codes_sha256": hashlib.sha256(b"".join(codes_of_clips)).hexdigest(),
            **results.results(benchmark, coded, prompts, scores, scoring, self.mean_of),
        }
        content = json.dumps(report, indent=1, allow_nan=False) + "\n"
        write_atomically(str(path.parent), path.name, content.encode())
        primary = [of_clip[PRIMARY] for of_clip in scores]
        results.write_submissions(path.with_name(f"{name}_submission"), clips, primary)
        log.close()
        print("\n".join([*results.summary(report), f"written to {path}"]))
        print_next(REPORT, results=options.output_dir, output_file=options.output_dir / "report.md")


_SCRIPTS = (
    BenchmarkScript("salmon", "slprl/SALMon", benchmarks.read_salmon, None, benchmarks.SALMON_PARTS, has_prompts=True),
    BenchmarkScript("sLM21", "speed", benchmarks.read_slm21, (0,), text_rules=("text",)),
    BenchmarkScript("sStoryCloze", "speed", benchmarks.read_storycloze, (0,), text_rules=tuple(TEXT_RULES)),
    # The benchmark accepts any score. The entries of its leaderboard score semantic tokens only, such as level 0 here.
    BenchmarkScript("prosaudit", None, benchmarks.read_prosaudit, (0,)),
)
BENCHMARK_SCRIPTS = {script.name: script for script in _SCRIPTS}
