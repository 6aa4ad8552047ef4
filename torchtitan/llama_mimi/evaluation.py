"""What the three benchmark scripts share: flags, the way from a source to scores, and the result file."""

import argparse
import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from llama_mimi.accuracy import credit, mean_of_parts, part_results
from llama_mimi.benchmarks import Benchmark, Clip
from llama_mimi.clip_codes import CachedCodes, CodeCache, encode_clips, made_by
from llama_mimi.clip_scores import ScoreLog, score_clips
from llama_mimi.codec import CodecAttention, codec_hash, whole_frames
from llama_mimi.errors import UserError
from llama_mimi.files import read_json, write_whole
from llama_mimi.hub import weights_sha256
from llama_mimi.ranks import Ranks, from_first, torchrun_ranks
from llama_mimi.scoring import Preset, check_levels, preset, with_options
from llama_mimi.speech_model import DECODER_DTYPES, load_speech_model
from llama_mimi.versions import versions

BATCH_TOKENS = (4096, 32768)  # without and with a GPU
MAX_AUDIO_SECONDS = 20.0  # of the paper's training
FORMAT = 1


@dataclass(frozen=True)
class BenchmarkScript:
    """One of the scripts in eval/.

    Args:
        name: of the benchmark, and of its folder of results.
        hub_source: read when no ``--data_dir`` is given.
        read: a reader of `llama_mimi.benchmarks`.
        levels: that both presets score; None is all.
        mean_of: parts whose mean is the benchmark's one number, where it has one.
        has_windows: offers ``--window_seconds``.
    """

    name: str
    hub_source: str
    read: Callable[[str], Benchmark]
    levels: tuple[int, ...] | None
    mean_of: Sequence[str] = ()
    has_windows: bool = False

    def run(self, doc: str | None) -> None:
        """Parse the command line, score, report.

        Args:
            doc: the script's docstring.

        Raises:
            UserError: a flag, the data or the model cannot be used.
        """
        flags = self._parse(doc)
        with torchrun_ranks(flags.device) as ranks:
            chosen = self._preset(flags)
            try:
                self._evaluate(flags, chosen, ranks)
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"the memory of '{ranks.device}' is full; lower --batch_tokens, or score in --dtype bfloat16"
                ) from error

    def _preset(self, flags: argparse.Namespace) -> Preset:
        for name in ("max_audio_seconds", "batch_tokens"):
            value = getattr(flags, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"--{name} is {value}; it must be a positive number")
        if flags.preset == "original" and flags.max_audio_seconds != MAX_AUDIO_SECONDS:
            raise UserError(f"--preset original cuts at {MAX_AUDIO_SECONDS:g} s; leave out --max_audio_seconds")
        if flags.preset == "original" and flags.codec_attention == "windowed":
            raise UserError("--preset original encodes without the codec's window; leave out --codec_attention")
        return with_options(
            preset(flags.preset, self.levels),
            levels=flags.levels,
            end_token=None if flags.end_token is None else flags.end_token == "in",
            statistic=flags.statistic,
            window_seconds=flags.window_seconds if self.has_windows else None,
        )

    def _parse(self, doc: str | None) -> argparse.Namespace:
        parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--model_name", default="llm-jp/Llama-Mimi-1.3B", help="hub id or folder")
        parser.add_argument("--data_dir", default=self.hub_source, help="official layout, Parquet, or a hub id")
        parser.add_argument("--output_dir", type=Path, default=Path("results"))
        parser.add_argument("--codes_dir", help="codes of clips, kept for other runs (default <output_dir>/codes)")
        parser.add_argument("--codec", help="hub id or folder; by default what the model names")
        parser.add_argument(
            "--codec_attention", choices=get_args(CodecAttention), help="by default that of the model's training codes"
        )
        parser.add_argument("--device", help="by default the accelerator where there is one")
        parser.add_argument(
            "--dtype", choices=DECODER_DTYPES, default="float32", help="of the decoder; the first release: float16"
        )
        parser.add_argument("--batch_tokens", type=int, help="tokens of a batch, with padding; default by device")
        parser.add_argument(
            "--max_audio_seconds", type=float, default=MAX_AUDIO_SECONDS, help="longer clips are cut, and counted"
        )
        parser.add_argument(
            "--preset",
            choices=("official", "original"),
            default="official",
            help="the benchmark's own rule, or what the first release of Llama-Mimi computes",
        )
        options = parser.add_argument_group("other scoring, which is named in the result file")
        options.add_argument("--levels", help="quantizer levels to score: all, or 0, or 0,1")
        options.add_argument("--end_token", choices=("in", "out"), help="score </audio> or not")
        options.add_argument("--statistic", choices=("mean", "sum"), help="of the log-likelihoods of a clip's tokens")
        if self.has_windows:
            options.add_argument("--window_seconds", type=float, help="score the least likely window of this length")
        return parser.parse_args()

    def _evaluate(self, flags: argparse.Namespace, chosen: Preset, ranks: Ranks) -> None:
        benchmark = self.read(flags.data_dir)
        model = load_speech_model(
            flags.model_name,
            codec_name=flags.codec,
            attention="whole" if chosen.scoring.as_released else flags.codec_attention,
            device=str(ranks.device),
            dtype=flags.dtype,
        )
        if not whole_frames(flags.max_audio_seconds, model.codec.config):
            raise UserError(
                f"--max_audio_seconds is {flags.max_audio_seconds}, less than a frame of the codec; raise it"
            )
        check_levels(chosen.scoring, model.codec.num_quantizers)
        header = {
            "format": FORMAT,
            "benchmark": self.name,
            "preset": chosen.name,
            "model": flags.model_name,
            "model_sha256": from_first(lambda: weights_sha256(flags.model_name)),
            "data": flags.data_dir,
            "scoring": chosen.describe(),
            "num_quantizers": model.codec.num_quantizers,
            "codec": {
                "name": model.codec.name,
                "sha256": codec_hash(model.codec.name),
                "attention": model.codec.attention,
            },
            "settings": {
                "dtype": flags.dtype,
                "device": ranks.device.type,
                "batch_tokens": flags.batch_tokens or BATCH_TOKENS[ranks.device.type == "cuda"],
                "max_audio_seconds": flags.max_audio_seconds,
            },
            "versions": versions(),
        }
        path = flags.output_dir / self.name / model_folder(flags.model_name) / f"{chosen.name}.json"
        replaced = from_first(lambda: check_earlier(path, header))

        clips = benchmark.clips
        as_released = chosen.scoring.as_released
        codes_dir = flags.codes_dir or str(flags.output_dir / "codes")
        cache = CodeCache(codes_dir, made_by(model.codec, flags.max_audio_seconds, as_released=as_released))
        audio_ids, codes = encode_clips(
            model.codec, clips, cache, ranks, flags.max_audio_seconds, as_released=as_released
        )
        header["audio_sha256"] = hashlib.sha256("".join(audio_ids).encode()).hexdigest()
        header["codes_sha256"] = codes_sha256(audio_ids, codes)
        log = ScoreLog(path.with_suffix(".partial"), log_key(header, adds_bos=model.sequences.adds_bos))
        scores = score_clips(model, codes, chosen.scoring, header["settings"]["batch_tokens"], log, ranks)
        if ranks.rank == 0:
            report = header | results(benchmark, audio_ids, codes, scores, chosen, self.mean_of)
            write_whole(str(path.parent), path.name, (json.dumps(report, indent=1, allow_nan=False) + "\n").encode())
            submissions = write_submissions(
                path.with_name(f"{chosen.name}_submission"), clips, [scores[audio_id] for audio_id in audio_ids]
            )
            log.close()
            for line in [*summary(report), *submissions, *replaced, f"written to {path}"]:
                print(line)


def model_folder(model_name: str) -> str:
    """What the folder of a model's results is called: the last part of its path or hub id."""
    path = Path(model_name)
    return path.resolve().name if path.is_dir() else path.name


def log_key(header: Mapping[str, Any], *, adds_bos: bool) -> dict[str, Any]:
    """What scores of given codes depend on; the commit is not in it, so that a file may be edited meanwhile."""
    keys = ("model_sha256", "scoring", "num_quantizers", "settings")
    numbers = {package: number for package, number in header["versions"].items() if package != "commit"}
    return {key: header[key] for key in keys} | {"versions": numbers, "adds_bos": adds_bos}


def check_earlier(path: Path, header: Mapping[str, Any]) -> list[str]:
    """What to say of a result file that will be replaced, if there is one.

    Raises:
        UserError: it is of other data or was made in another way, so that it would be lost.
    """
    earlier = read_json(str(path.parent), path.name)
    if earlier is None:
        return []
    differing = {
        "--model_name": (earlier.get("model"), header["model"]),
        "--data_dir": (earlier.get("data"), header["data"]),
        "--codec with the hash": (earlier.get("codec", {}).get("sha256"), header["codec"]["sha256"]),
        "the codec's attention": (earlier.get("codec", {}).get("attention", "windowed"), header["codec"]["attention"]),
        **{
            f"--{name}": (earlier.get("settings", {}).get(name), header["settings"][name])
            for name in ("dtype", "max_audio_seconds")
        },
    }
    for name, (before, now) in differing.items():
        if before != now:
            raise UserError(
                f"'{path}' was made with {name} {before!r}, not {now!r}; choose another --output_dir, or move it away"
            )
    if earlier.get("model_sha256") != header["model_sha256"]:
        return [f"replaced: '{path}' was of other weights ({str(earlier.get('model_sha256'))[:12]})"]
    return []


def results(
    benchmark: Benchmark,
    audio_ids: Sequence[str],
    codes: Mapping[str, CachedCodes],
    scores: Mapping[str, float],
    chosen: Preset,
    mean_of: Sequence[str],
) -> dict[str, Any]:
    """What a result file holds beside how it was made: accuracies by part, their mean, and every pair."""
    pairs = []
    paired = audio_ids[: 2 * len(benchmark.pairs)]
    for pair, positive_id, negative_id in zip(benchmark.pairs, paired[::2], paired[1::2], strict=True):
        positive, negative = scores[positive_id], scores[negative_id]
        pairs.append(
            {
                "part": pair.part,
                "name": pair.name,
                "group": pair.group,
                "labels": dict(pair.labels),
                "positive": pair.positive.name,
                "negative": pair.negative.name,
                "positive_score": positive,
                "negative_score": negative,
                "correct": credit(positive, negative, chosen.tie),
                "is_tie": positive == negative,
                "is_cut": codes[positive_id].is_cut or codes[negative_id].is_cut,
            }
        )
    parts = part_results(pairs, by_group=chosen.by_group)
    of_parts = {}
    if mean_of:
        of_parts = {
            "mean_of_parts": mean_of_parts(parts, mean_of),
            "missing_parts": [part for part in mean_of if part not in parts],
        }
    return {
        "parts": parts,
        **of_parts,
        "unpaired_clips": len(benchmark.unpaired),
        "notes": benchmark.notes,
        "pairs": pairs,
    }


def summary(report: Mapping[str, Any]) -> list[str]:
    """The lines that a script prints."""
    seconds = report["settings"]["max_audio_seconds"]
    lines = list(report["notes"])
    for part, result in report["parts"].items():
        lines.append(f"{part}: {_accuracy(result)}{_touched(result, seconds)}")
        for label, values in result["by"].items():
            lines += [f"  {label} {value}: {_accuracy(some)}" for value, some in values.items()]
    if report.get("mean_of_parts") is not None:
        lines.append(f"mean of the parts: {_accuracy(report['mean_of_parts'])}")
    elif "mean_of_parts" in report:
        lines.append(f"no mean of the parts, as some are not there: {', '.join(report['missing_parts'])}")
    return lines


def codes_sha256(audio_ids: Sequence[str], codes: Mapping[str, CachedCodes]) -> str:
    """SHA-256 of the codes of all clips in order: results compare only where it is the same."""
    digest = hashlib.sha256()
    for audio_id in audio_ids:
        digest.update(codes[audio_id].codes_TQ.astype(np.int32).tobytes())
    return digest.hexdigest()


def write_submissions(folder: Path, clips: Sequence[Clip], scores: Sequence[float]) -> list[str]:
    """Write sLM21's submission, ``<task>/<split>.txt`` with lines ``filename score``; returns what to say of it."""
    lines: dict[str, list[str]] = defaultdict(list)
    for clip, score in zip(clips, scores, strict=True):
        if clip.split is not None:
            lines[clip.split].append(f"{Path(clip.name).stem} {score!r}\n")
    for split, rows in lines.items():
        task, name = split.split("/")
        write_whole(str(folder / task), f"{name}.txt", "".join(rows).encode())
    return [f"submission files of {', '.join(sorted(lines))} in {folder}"] if lines else []


def _accuracy(result: Mapping[str, Any]) -> str:
    low, high = result["interval"]
    return (
        f"{100 * result['accuracy']:.1f} % (95 % interval {100 * low:.1f} to {100 * high:.1f}, "
        f"{result['count']:,} counted)"
    )


def _touched(result: Mapping[str, Any], seconds: float) -> str:
    cut = f", {result['pairs_cut']:,} cut at {seconds:g} s" if result["pairs_cut"] else ""
    return f" of {result['pairs']:,} pairs, {result['ties']:,} ties{cut}"
