"""Results of any number of models as one Markdown table and a bar chart, with published numbers beside them.

    uv run python scripts/report.py --results results --output_file results/report.md --picture results/report.png

Reads every result file of eval/ below the folders. Standard presets and other scoring stand in tables of their own.
Models that were scored on the same pairs are compared by McNemar's exact test.
"""

import argparse
import itertools
import json
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from llama_mimi.accuracy import group_credits, mcnemar
from llama_mimi.benchmarks import SALMON_PARTS
from llama_mimi.errors import UserError, run_cli
from llama_mimi.evaluation import FORMAT

STANDARD = ("official", "original")
# Columns in the order of the table, and what they are called there; parts of other names follow.
HEADINGS = {
    **{f"salmon/{part}": f"SALMon {part.replace('_', ' ').replace('bg', 'background')}" for part in SALMON_PARTS},
    "salmon/mean": "SALMon mean",
    "sLM21/lexical_dev": "sWUGGY",
    "sLM21/syntactic_dev": "sBLIMP",
    "sStoryCloze/sStoryCloze": "sStoryCloze",
    "sStoryCloze/tStoryCloze": "tStoryCloze",
}


@dataclass
class Row:
    """One model under one scoring, or one published row.

    Args:
        name: of the row.
        accuracies: percent by column.
        intervals: percent by column, none where the source gives none.
        reports: result files by benchmark; none for what others have published.
    """

    name: str
    accuracies: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    reports: dict[str, dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", nargs="+", type=Path, default=[Path("results")], help="folders of result files")
    parser.add_argument("--published", type=Path, default=Path("eval/published.toml"), help="numbers of others")
    parser.add_argument("--output_file", type=Path, help="Markdown; it is printed in any case")
    parser.add_argument("--picture", type=Path, help="bar chart of the standard presets, PNG or PDF")
    flags = parser.parse_args()

    rows = read_rows(flags.results)
    published = read_published(flags.published)
    standard = {key: row for key, row in rows.items() if key[2] in STANDARD}
    other = {key: row for key, row in rows.items() if key[2] not in STANDARD}
    sections = []
    if standard:
        columns = ordered(column for row in standard.values() for column in row.accuracies)
        beside = [row for row in published if row.accuracies.keys() & set(columns)]
        sections += ["## Accuracy", table([*standard.values(), *beside], columns), notes(standard.values())]
        if beside:
            sections.append(
                "Rows with a source in brackets are numbers of others on the full benchmarks, by their own scoring."
            )
    if other:
        columns = ordered(column for row in other.values() for column in row.accuracies)
        sections += ["## Other scoring, not to be compared with the above", table(list(other.values()), columns)]
        sections += [notes(other.values())]
    if differences := compare(rows):
        sections += ["## Differences between models", differences]
    text = "\n\n".join(sections) + "\n"
    print(text)
    if flags.output_file is not None:
        flags.output_file.parent.mkdir(parents=True, exist_ok=True)
        flags.output_file.write_text(text)
    if flags.picture is not None:
        if not standard:
            raise UserError("there is no result of a standard preset to draw; leave out --picture")
        draw(list(standard.values()), beside, columns_of_picture(standard.values()), flags.picture)


def read_rows(folders: Sequence[Path]) -> dict[tuple[str, str, str], Row]:
    """Rows by model, hash of its weights, and preset.

    Raises:
        UserError: no result file, one that cannot be read, or two of the same.
    """
    rows: dict[tuple[str, str, str], Row] = {}
    paths = sorted({path for folder in folders for path in folder.rglob("*.json")})
    for path in paths:
        try:
            report = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"'{path}' is no readable JSON ({error}); move it out or make it anew") from error
        if not isinstance(report, dict) or "benchmark" not in report:
            continue  # another program's
        if report.get("format") != FORMAT:
            raise UserError(f"'{path}' has format {report.get('format')!r}, not {FORMAT}; score the model anew")
        key = (report["model"], report["model_sha256"], report["preset"])
        row = rows.setdefault(key, Row("", {}, {}, {}))
        benchmark = report["benchmark"]
        if benchmark in row.reports:
            raise UserError(f"'{path}' is a second result of {key[0]} on {benchmark} ({key[2]}); leave one out")
        row.reports[benchmark] = report
        results = {f"{benchmark}/{part}": result for part, result in report["parts"].items()}
        if report.get("mean_of_parts"):
            results[f"{benchmark}/mean"] = report["mean_of_parts"]
        for column, result in results.items():
            row.accuracies[column] = 100 * result["accuracy"]
            low, high = result["interval"]
            row.intervals[column] = (100 * low, 100 * high)
    if not rows:
        raise UserError(f"there is no result file in {', '.join(map(str, folders))}; run the scripts in eval/ first")
    names = [(Path(model).name, preset) for model, _, preset in rows]
    for (model, sha256, preset), row in rows.items():
        is_alone = names.count((Path(model).name, preset)) == 1
        row.name = f"{Path(model).name} ({'' if is_alone else f'{model}, {sha256[:8]}, '}{preset})"
    return rows


def read_published(path: Path) -> list[Row]:
    """Rows of others.

    Raises:
        UserError: the file is missing or is not as it should be.
    """
    try:
        rows = tomllib.loads(path.read_text())["rows"]
        return [Row(f"{row['model']} [{row['source']}]", dict(row["scores"]), {}, {}) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{path}' is no list of published rows ({error}); see eval/published.toml") from error


def ordered(columns: Iterable[str]) -> list[str]:
    """Columns once each, in the order of `HEADINGS`, others after them."""
    found = set(columns)
    return [column for column in HEADINGS if column in found] + sorted(found - HEADINGS.keys())


def heading(column: str) -> str:
    return HEADINGS.get(column, column)


def table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Rows by columns in Markdown: percent, with the 95 % interval where there is one."""

    def cell(row: Row, column: str) -> str:
        if column not in row.accuracies:
            return ""
        interval = row.intervals.get(column)
        return f"{row.accuracies[column]:.1f}" + (
            "" if interval is None else f" ({interval[0]:.1f} to {interval[1]:.1f})"
        )

    lines = [["model", *map(heading, columns)], ["---"] * (len(columns) + 1)]
    lines += [[row.name, *(cell(row, column) for column in columns)] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def notes(rows: Iterable[Row]) -> str:
    """What must be known beside the numbers: counts, pairs touched by the cut, and rows that do not compare."""
    lines = []
    reports = [(row.name, report) for row in rows for report in row.reports.values()]
    counts: dict[str, set[str]] = defaultdict(set)
    sources: dict[str, set[str]] = defaultdict(set)
    for name, report in reports:
        sources[report["benchmark"]].add(report["data"])
        for part, result in report["parts"].items():
            column = heading(f"{report['benchmark']}/{part}")
            counts[column].add(f"{result['count']:,}")
            if result["pairs_cut"]:
                seconds = report["settings"]["max_audio_seconds"]
                lines.append(
                    f"- {name}, {column}: {result['pairs_cut']:,} of {result['pairs']:,} pairs were touched by the cut "
                    f"at {seconds:g} s."
                )
    if not lines:
        lines.append("- No pair was touched by the cut.")
    numbers = "; ".join(f"{column} {' or '.join(sorted(number))}" for column, number in counts.items())
    lines.insert(0, f"- In percent, with 95 % intervals (Wilson) of so many words, sentences or pairs: {numbers}.")
    lines += [
        f"- Rows of {benchmark} were scored on different data: {', '.join(sorted(names))}."
        for benchmark, names in sources.items()
        if len(names) > 1
    ]
    return "\n".join(lines)


def compare(rows: Mapping[tuple[str, str, str], Row]) -> str:
    """McNemar's test of every two models under the same scoring on the same pairs; empty where there are none."""
    lines = []
    for (key_a, a), (key_b, b) in itertools.combinations(rows.items(), 2):
        if key_a[2] != key_b[2]:
            continue
        for benchmark in sorted(a.reports.keys() & b.reports.keys()):
            by_group = a.reports[benchmark]["scoring"]["by_group"]
            credits_a, credits_b = (group_credits(row.reports[benchmark]["pairs"], by_group=by_group) for row in (a, b))
            for part in sorted({part for part, _ in credits_a} & {part for part, _ in credits_b}):
                of_part = [
                    {key: c for key, c in credits.items() if key[0] == part} for credits in (credits_a, credits_b)
                ]
                if of_part[0].keys() != of_part[1].keys():
                    continue
                test = mcnemar(*of_part)
                lines.append(
                    f"| {heading(f'{benchmark}/{part}')} | {a.name} | {b.name} | {test['a_better']:,} | "
                    f"{test['b_better']:,} | {test['p']:.2g} |"
                )
    if not lines:
        return ""
    header = ["| | A | B | only A right | only B right | p |", "|---|---|---|---|---|---|"]
    return "\n".join([*header, *lines, "", "McNemar's exact test, two-sided, not corrected for the number of tests."])


def columns_of_picture(rows: Iterable[Row]) -> list[str]:
    return ordered(column for row in rows for column in row.accuracies)


def draw(rows: Sequence[Row], published: Sequence[Row], columns: Sequence[str], path: Path) -> None:
    """A group of bars for each column: ours with their intervals, then what others have published, hatched.

    Raises:
        UserError: the picture cannot be written.
    """
    groups = [[row for row in (*rows, *published) if column in row.accuracies] for column in columns]
    colors = {row.name: plt.get_cmap("tab20")(i % 20) for i, row in enumerate((*rows, *published))}
    height = 0.28 * sum(len(group) for group in groups) + 0.3 * len(groups) + 1.2
    figure, axes = plt.subplots(figsize=(9, height), layout="constrained")
    y, ticks, labels = 0.0, [], []
    for column, group in zip(columns, groups, strict=True):
        axes.text(0.8, y, heading(column), va="center", weight="bold", fontsize=9)
        y += 1
        for row in group:
            value = row.accuracies[column]
            low, high = row.intervals.get(column, (value, value))
            error = [[value - low], [high - value]] if column in row.intervals else None
            hatch = None if row.reports else "///"
            axes.barh(y, value, height=0.8, color=colors[row.name], hatch=hatch, edgecolor="white", xerr=error)
            axes.text(max(value, high) + 1, y, f"{value:.1f}", va="center", fontsize=8)
            ticks.append(y)
            labels.append(row.name)
            y += 1
        y += 0.4
    axes.axvline(50, color="black", linewidth=0.8, linestyle=":")
    axes.set(xlim=(0, 108), xlabel="accuracy (%), 95 % interval; hatched: published by others; dotted: chance")
    axes.set_yticks(ticks, labels, fontsize=8)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(f"the picture '{path}' could not be written ({error}); choose another --picture") from error
    finally:
        plt.close(figure)


if __name__ == "__main__":
    run_cli(main)
