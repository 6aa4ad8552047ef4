"""What a result file holds, what it must not replace, and what a script prints of it."""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_mimi.common.errors import UserError
from llama_mimi.common.files import read_json, write_atomically
from llama_mimi.evaluation.accuracy import credit, mean_of_parts, part_results
from llama_mimi.evaluation.benchmarks import Benchmark, BenchmarkClip
from llama_mimi.evaluation.clip_codes import CachedCodes
from llama_mimi.evaluation.scoring import Preset

FORMAT = 1
MAX_AUDIO_SECONDS = 20.0  # of the paper's training


def model_folder(model_name: str) -> str:
    """What the folder of a model's results is called: the last part of its path or hub id."""
    path = Path(model_name)
    return path.resolve().name if path.is_dir() else path.name


def log_key(header: Mapping[str, Any], *, adds_bos: bool) -> dict[str, Any]:
    """What scores depend on, given the codes; the commit is left out, so that an edited file does not void the log."""
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
        "the codec's attention": (earlier.get("codec", {}).get("attention"), header["codec"]["attention"]),
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


def write_submissions(folder: Path, clips: Sequence[BenchmarkClip], scores: Sequence[float]) -> list[str]:
    """Write sLM21's submission, ``<task>/<split>.txt`` with lines ``filename score``; returns what to say of it."""
    lines: dict[str, list[str]] = defaultdict(list)
    for clip, score in zip(clips, scores, strict=True):
        if clip.split is not None:
            lines[clip.split].append(f"{Path(clip.name).stem} {score!r}\n")
    for split, rows in lines.items():
        task, name = split.split("/")
        write_atomically(str(folder / task), f"{name}.txt", "".join(rows).encode())
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
