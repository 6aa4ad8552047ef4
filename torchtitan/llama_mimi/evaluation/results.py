"""Result files: contents, protection of earlier ones, and the printed summary."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_mimi.common.files import read_json, write_atomically
from llama_mimi.common.resume import require_same
from llama_mimi.evaluation.accuracy import mean_of_parts, part_results
from llama_mimi.evaluation.benchmarks import Benchmark, Clip
from llama_mimi.evaluation.codes import ClipCodes
from llama_mimi.evaluation.scoring import Scoring

FORMAT = 2
MAX_AUDIO_SECONDS = 20.0  # of the paper's training


def model_folder(model_name: str) -> str:
    """Return the name of a model's folder of results: the last part of its path or hub id."""
    path = Path(model_name)
    return path.resolve().name if path.is_dir() else path.name


def check_earlier(path: Path, header: Mapping[str, Any]) -> list[str]:
    """Return a notice if a result of other weights will be replaced.

    Raises:
        UserError: the file is a result of another format, model, data, codec or setting.
    """
    earlier = read_json(str(path.parent), path.name)
    if earlier is None:
        return []
    current = {key: header[key] for key in ("format", "model", "data")}
    current["codec"] = {key: header["codec"][key] for key in ("sha256", "attention")}
    current["settings"] = {key: header["settings"][key] for key in ("dtype", "max_audio_seconds")}
    require_same(earlier, current, f"'{path}'", "choose another --output_dir, or move the file")
    if earlier.get("model_sha256") != header["model_sha256"]:
        return [f"replaced: '{path}' was of other weights ({str(earlier.get('model_sha256'))[:12]})"]
    return []


def results(
    benchmark: Benchmark,
    audio_ids: Sequence[str],
    codes: Mapping[str, ClipCodes],
    scores: Mapping[str, float],
    scoring: Scoring,
    mean_of: Sequence[str],
) -> dict[str, Any]:
    """Return the accuracies by part, their mean, and every pair.

    Args:
        audio_ids: SHA-256 of the audio of each clip, in the order of ``benchmark.clips``.
        codes, scores: values by SHA-256.
        scoring: rule for ties and groups.
        mean_of: parts to average; empty for a benchmark without a mean.
    """
    pairs = []
    for index, pair in enumerate(benchmark.pairs):
        positive_id, negative_id = audio_ids[2 * index : 2 * index + 2]
        positive, negative = scores[positive_id], scores[negative_id]
        pairs.append(
            {
                "part": pair.part,
                "name": pair.name,
                "group": pair.group,
                "labels": pair.labels,
                "positive": pair.positive.name,
                "negative": pair.negative.name,
                "positive_score": positive,
                "negative_score": negative,
                "correct": scoring.tie if positive == negative else float(positive > negative),
                "is_tie": positive == negative,
                "is_cut": codes[positive_id].is_cut or codes[negative_id].is_cut,
            }
        )
    parts = part_results(pairs, by_group=scoring.by_group)
    mean: dict[str, Any] = {}
    if mean_of:
        mean["mean_of_parts"] = mean_of_parts(parts, mean_of)
        mean["missing_parts"] = [part for part in mean_of if part not in parts]
    return {
        "parts": parts,
        **mean,
        "unpaired_clips": len(benchmark.unpaired),
        "notes": benchmark.notes,
        "pairs": pairs,
    }


def summary(report: Mapping[str, Any]) -> list[str]:
    """Return the lines that a script prints."""
    lines = list(report["notes"])
    if report["data_kind"] == "synthetic":
        lines.insert(0, "synthetic data: these accuracies compare with each other, not with published ones")
    for part, result in report["parts"].items():
        seconds = report["settings"]["max_audio_seconds"]
        cut = f", {result['pairs_cut']:,} cut at {seconds:g} s" if result["pairs_cut"] else ""
        lines.append(f"{part}: {_accuracy(result)} of {result['pairs']:,} pairs, {result['ties']:,} ties{cut}")
        for label, values in result["by"].items():
            lines += [f"  {label} {value}: {_accuracy(some)}" for value, some in values.items()]
    if report.get("mean_of_parts") is not None:
        lines.append(f"mean of the parts: {_accuracy(report['mean_of_parts'])}")
    elif "mean_of_parts" in report:
        lines.append(f"no mean of the parts; missing: {', '.join(report['missing_parts'])}")
    return lines


def write_submissions(folder: Path, clips: Sequence[Clip], scores: Sequence[float]) -> list[str]:
    """Write sLM21's submission, ``<task>/<split>.txt`` with lines ``filename score``; return a message about it."""
    lines: dict[str, list[str]] = defaultdict(list)
    for clip, score in zip(clips, scores, strict=True):
        if clip.split is not None:
            lines[clip.split].append(f"{Path(clip.name).stem} {score!r}\n")
    for split, rows in lines.items():
        task, name = split.split("/")
        write_atomically(str(folder / task), f"{name}.txt", "".join(rows).encode())
    return [f"submission files of {', '.join(sorted(lines))} in {folder}"] if lines else []


def _accuracy(result: Mapping[str, Any]) -> str:
    low, high = (100 * bound for bound in result["interval"])
    return f"{100 * result['accuracy']:.1f} % (95 % interval {low:.1f} to {high:.1f}, {result['count']:,} counted)"
