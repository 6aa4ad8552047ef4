"""Result files of systems that continued the same prompts, side by side."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama_mimi.judging.intervals import interval, on_same_samples, paired_difference

KIND = "generations"  # what a result file calls itself


@dataclass(frozen=True)
class Column:
    """A measure in a table.

    Args:
        heading: with its unit.
        digits: after the point.
        shown: of a mean, such as exp of a mean logarithm.
    """

    heading: str
    digits: int = 3
    shown: Callable[[float], float] = float


def percent(share: float) -> float:
    return 100 * share


# In the order of the table; criteria of a judge follow.
COLUMNS = {
    "similarity": Column("speaker similarity"),
    "distillmos": Column("DistillMOS", 2),
    "aesthetics/CE": Column("enjoyment", 2),
    "aesthetics/CU": Column("usefulness", 2),
    "aesthetics/PC": Column("complexity", 2),
    "aesthetics/PQ": Column("quality", 2),
    "log_perplexity": Column("perplexity", 1, math.exp),
    "words_per_minute": Column("words/min", 0),
    "seconds": Column("seconds", 2),
    "silent": Column("silent (%)", 1, percent),
    "ended": Column("ended by itself (%)", 1, percent),
    "distinct_frames": Column("distinct frames (%)", 1, percent),
    "real_time_factor": Column("real-time factor", 2),
}


def column_of(name: str) -> Column:
    return COLUMNS.get(name) or Column(f"judged {name.removeprefix('judge/')}", 2)


def is_reference(samples: Sequence[Mapping[str, Any]]) -> bool:
    """Whether they are no continuations of a model, but what stands beside them, such as the recordings."""
    return all(sample["sample"] is None for sample in samples)


def columns_in(systems: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Measures that any sample has, in the order of `COLUMNS`, criteria after them."""
    found = {
        key for samples in systems.values() for sample in samples for key in sample if key in COLUMNS or "/" in key
    }
    return [name for name in COLUMNS if name in found] + sorted(found - COLUMNS.keys())


def means(systems: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, dict[str, Any]]]:
    """For each column and system `mean`, `interval`, `count` (prompts) and `left_out` (samples), as they are shown."""
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for name in columns_in(systems):
        shown = column_of(name).shown
        same = on_same_samples(systems, name)
        results[name] = {
            system: {
                "mean": shown(sum(values.values()) / len(values)),
                "interval": tuple(map(shown, interval(list(values.values())))),
                "count": len(values),
                "left_out": same.left_out[system],
            }
            for system, values in same.means.items()
            if values
        }
    return results


def table(
    systems: Mapping[str, Sequence[Mapping[str, Any]]], published: Sequence[tuple[str, Mapping[str, float]]] = ()
) -> str:
    """Systems by measures in Markdown, with 95 % intervals, and what must be known beside it.

    Args:
        systems: samples by the label of a row.
        published: rows of others.
    """
    results = means(systems)
    headings = ["system", *(column_of(name).heading for name in results)]
    lines = [headings, ["---"] * len(headings)]
    for system in systems:
        lines.append([system, *(_cell(column_of(name), of.get(system)) for name, of in results.items())])
    for label, scores in published:
        cells = [f"{scores[name]:.{column_of(name).digits}f}" if name in scores else "" for name in results]
        lines.append([label, *cells])
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    headings_of: dict[str, list[str]] = {}
    for name in results:
        same = on_same_samples(systems, name)
        count = max(map(len, same.means.values()), default=0)
        left_out = [f"{system} {number:,}" for system, number in same.left_out.items() if number]
        note = f"{count:,} prompt{'s' * (count != 1)}."
        if left_out:
            note += f" Samples left out, as one of the systems has no value there: {', '.join(left_out)}."
        if same.empty:
            note += f" Without any value, and so without a part in this: {', '.join(same.empty)}."
        headings_of.setdefault(note, []).append(column_of(name).heading)
    notes = ["- Means over prompts, with 95 % bootstrap intervals over prompts."]
    notes += [f"- {', '.join(headings)}: {note}" for note, headings in headings_of.items()]
    return "\n\n".join([rows, "\n".join(notes)])


def differences(systems: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Every two systems on the same prompts in Markdown, and each beside the references; empty where there are none."""
    references = {name for name, samples in systems.items() if is_reference(samples)}
    lines = ["| | A | B | A - B | 95 % interval | prompts |", "|---|---|---|---|---|---|"]
    for name in columns_in(systems):
        column = column_of(name)
        by_system = on_same_samples(systems, name).means
        for (a, values_a), (b, values_b) in itertools.combinations(by_system.items(), 2):
            if not values_a or {a, b} <= references:
                continue
            found = paired_difference(values_a, values_b)
            is_ratio = column.shown is math.exp
            shown = column.shown if is_ratio or column.shown is percent else float
            number, low, high = (f"{shown(x):.{column.digits + 1}f}" for x in (found["difference"], *found["interval"]))
            heading = f"{column.heading} (A / B)" if is_ratio else column.heading
            lines.append(f"| {heading} | {a} | {b} | {number} | {low} to {high} | {found['count']:,} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _cell(column: Column, result: Mapping[str, Any] | None) -> str:
    if result is None:
        return ""
    mean, low, high = (f"{value:.{column.digits}f}" for value in (result["mean"], *result["interval"]))
    return f"{mean} ({low} to {high})"
