"""Compute accuracies from scores; build, check and print result files."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_mimi.common.files import read_json, write_atomically
from llama_mimi.common.resume import require_same
from llama_mimi.corpora.code_shards import CodedClip
from llama_mimi.evaluation.benchmarks import FREQUENCY_BANDS, Benchmark, Clip
from llama_mimi.evaluation.options import PRIMARY, Scoring
from llama_mimi.evaluation.statistics import wilson_interval

FORMAT = 4  # format number of all results of eval/
Result = dict[str, Any]


def check_earlier(path: Path, header: Mapping[str, Any]) -> None:
    """Raise a `UserError` if a result of other data or settings exists; print a notice if its weights differ."""
    current = {key: header[key] for key in ("format", "model", "data")}
    current["codec"] = {key: header["codec"][key] for key in ("sha256", "sliding_window")}
    current["settings"] = {key: header["settings"][key] for key in ("dtype", "max_audio_seconds")}
    earlier = read_json(str(path.parent), path.name) or current
    require_same(earlier, current, f"'{path}'", "choose another --output_dir, or move the file to another folder")
    if earlier.get("model_sha256", header["model_sha256"]) != header["model_sha256"]:
        print(f"'{path}' is from other model weights, and will be replaced", flush=True)


def results(
    benchmark: Benchmark,
    clips: Sequence[CodedClip],
    prompts: Sequence[int | None],
    scores: Sequence[Mapping[str, float]],
    scoring: Scoring,
    mean_of: Sequence[str],
) -> Result:
    """Return the score-dependent entries of a result file: first of the primary rule, then of the further rules.

    ``clips``, ``prompts`` (numbers of prompt frames) and ``scores`` (by rule) are in the order of `Benchmark.clips`.
    """

    def decision(positive: float, negative: float) -> Result:
        scored, tie = {"positive_score": positive, "negative_score": negative}, 0.0 if scoring.as_released else 0.5
        correct = tie if positive == negative else float(positive > negative)
        return scored | {"is_tie": positive == negative, "correct": correct}

    def accuracies(pairs: Sequence[Mapping[str, Any]]) -> Result:
        parts = part_results(pairs, by_group=not scoring.as_released)
        return {"parts": parts} | ({"mean_of_parts": mean_of_parts(parts, mean_of)} if mean_of else {})

    pairs: list[Result] = []
    for index, pair in enumerate(benchmark.pairs):
        both = slice(2 * index, 2 * index + 2)
        positive, negative = scores[both]
        rules = {rule: decision(positive[rule], negative[rule]) for rule in positive if rule in negative}
        entry = vars(pair) | {"positive": pair.positive.name, "negative": pair.negative.name} | rules.pop(PRIMARY)
        entry |= {"is_cut": any(clip.is_cut for clip in clips[both]), "rules": rules}
        if (prompt := prompts[2 * index]) is not None:
            entry["prompt_frames"] = prompt
        pairs.append(entry)
    by_rule: dict[str, list[Result]] = defaultdict(list)
    for entry in pairs:
        for rule, decided in entry["rules"].items():
            by_rule[rule].append(entry | decided)
    report = accuracies(pairs) | {"rules": {rule: accuracies(decided) for rule, decided in by_rule.items()}}
    return report | {"unpaired_clips": len(benchmark.unpaired), "notes": benchmark.notes, "pairs": pairs}


def part_results(pairs: Sequence[Mapping[str, Any]], *, by_group: bool) -> dict[str, Result]:
    """Return accuracy, 95 % interval and counts of each part and, in the entry "by", of each label value.

    With ``by_group``, accuracies are first averaged within each group (such as the voices of a word), and "count" is
    the number of groups.
    """
    members: dict[tuple[str, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for pair in pairs:
        members[(pair["part"],)].append(pair)
        for label, value in pair["labels"].items():
            members[pair["part"], label, value].append(pair)
    bands = {name: place for place, (_, name) in enumerate(FREQUENCY_BANDS)}  # sort order of bands
    found: dict[str, Result] = {}
    for part, *label in sorted(members, key=lambda key: (key[:2], bands.get(key[-1], len(bands)), key[2:])):
        some = members[part, *label]
        credits: dict[Any, list[float]] = defaultdict(list)
        for index, pair in enumerate(some):
            credits[pair["group"] if by_group else index].append(pair["correct"])
        accuracy = sum(sum(values) / len(values) for values in credits.values()) / len(credits)
        result = {
            "accuracy": accuracy,
            "interval": wilson_interval(accuracy, len(credits)),
            "count": len(credits),
            "pairs": len(some),
            "ties": sum(pair["is_tie"] for pair in some),
            "pairs_cut": sum(pair["is_cut"] for pair in some),
        }
        if label:
            found[part]["by"].setdefault(label[0], {})[label[1]] = result
        else:
            found[part] = result | {"by": {}}
    return found


def mean_of_parts(results: Mapping[str, Result], parts: Sequence[str]) -> Result | None:
    """Return the unweighted mean accuracy of k parts, or None if a part is missing.

    The interval is Wilson's interval for k^2 / sum(1/n_i) pairs; part i has n_i pairs. If all parts have the same size,
    this number is the total number of pairs.
    """
    if any(part not in results for part in parts):
        return None
    accuracy = sum(results[part]["accuracy"] for part in parts) / len(parts)
    count = len(parts) ** 2 / sum(1 / results[part]["count"] for part in parts)
    return {"accuracy": accuracy, "interval": wilson_interval(accuracy, count), "count": round(count)}


def summary(report: Result) -> list[str]:
    """Return the lines to print for a result."""

    def shown(result: Result) -> str:
        low, high = (100 * bound for bound in result["interval"])
        return f"{100 * result['accuracy']:.1f} % (95 % interval {low:.1f} to {high:.1f}, n = {result['count']:,})"

    lines = list(report["notes"])
    if report["data_kind"] == "synthetic":
        lines.insert(0, "synthetic data: do not compare these accuracies with published ones")
    for part, result in report["parts"].items():
        seconds = report["settings"]["max_audio_seconds"]
        cut = f", {result['pairs_cut']:,} pairs cut at {seconds:g} s" if result["pairs_cut"] else ""
        lines.append(f"{part}: {shown(result)}, {result['pairs']:,} pairs, {result['ties']:,} ties{cut}")
        for label, values in result["by"].items():
            lines += [f"  {label} {value}: {shown(some)}" for value, some in values.items()]
    if (mean := report.get("mean_of_parts")) is not None:
        lines.append(f"mean over parts: {shown(mean)}")
    for rule, found in report["rules"].items():
        mean = found.get("mean_of_parts")
        accuracies = {"mean over parts": mean} if mean else found["parts"]
        shown_parts = "; ".join(f"{part}: {shown(result)}" for part, result in accuracies.items())
        lines.append(f"rule {rule.replace('_', ' ')}: {shown_parts}")
    return lines


def write_submissions(folder: Path, clips: Sequence[Clip], scores: Sequence[float]) -> None:
    """Write a file ``<split>.txt`` for each split, as ZeroSpeech's toolkit expects. Each line is ``filename score``."""
    lines: dict[str, list[str]] = defaultdict(list)
    for clip, score in zip(clips, scores, strict=True):
        if clip.split is not None:
            lines[clip.split].append(f"{Path(clip.name).stem} {score!r}\n")
    for split, rows in lines.items():
        path = folder / f"{split}.txt"
        write_atomically(str(path.parent), path.name, "".join(rows).encode())
