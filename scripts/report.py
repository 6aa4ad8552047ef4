"""Results of any number of models as one Markdown table and a bar chart, with published numbers beside them.

    uv run python scripts/report.py --results results --output_file results/report.md --picture results/report.png

Reads every result file of eval/ below the folders. Standard presets and other scoring stand in tables of their own.
Models that were scored on the same audio are compared by McNemar's exact test. Judged continuations of
eval/generation.py have tables of their own, too; a second picture shows them.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from generations import MEASURES, draw_generations, read_generations
from generations import sections as generation_sections
from pictures import save
from published import read_published
from result_files import read_results

from llama_mimi.common.command_line import run_command
from llama_mimi.common.errors import UserError
from llama_mimi.common.files import write_atomically
from llama_mimi.evaluation.accuracy import group_credits
from llama_mimi.evaluation.benchmarks import SALMON_PARTS
from llama_mimi.evaluation.results import MAX_AUDIO_SECONDS
from llama_mimi.evaluation.statistics import sign_test

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


@dataclass(frozen=True)
class Key:
    """What results must share to stand in one row."""

    model_sha256: str
    preset: str
    dtype: str
    max_audio_seconds: float
    codec_attention: str


@dataclass
class Row:
    """One model under one scoring, or one published row.

    Args:
        name: of the model.
        accuracies: percent by column.
        intervals: percent by column, none where the source gives none.
        reports: result files by benchmark; none for what others have published.
        label: of the row: the name, and what tells it from others.
    """

    name: str
    accuracies: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    reports: dict[str, dict[str, Any]]
    label: str = ""


def report(
    results: tuple[Path, ...] = (Path("results"),),
    published: Path = Path("eval/published.toml"),
    output_file: Path | None = None,
    picture: Path | None = None,
    generations_picture: Path | None = None,
) -> None:
    """Put result files into one table.

    Args:
        results: folders of result files
        published: numbers of others
        output_file: Markdown; it is printed in any case
        picture: bar chart of the standard presets, PNG or PDF
        generations_picture: of judged continuations, the first set of them; PNG or PDF

    Raises:
        UserError: there are no results, or one cannot be read.
    """
    reports = read_results(results)
    rows = read_rows(reports)
    sets = read_generations(reports)
    if not rows and not sets:
        raise UserError(f"there is no result file in {', '.join(map(str, results))}; run the scripts in eval/ first")
    of_others = published_rows(published)
    standard = {key: row for key, row in rows.items() if is_standard(key)}
    other = {key: row for key, row in rows.items() if not is_standard(key)}
    sections = []
    columns = ordered(column for row in standard.values() for column in row.accuracies)
    if standard:
        beside = [row for row in of_others if row.accuracies.keys() & set(columns)]
        sections += ["## Accuracy", table([*standard.values(), *beside], columns), notes(standard.values())]
        if beside:
            sections.append("Rows with a source in brackets are numbers of others, by their own scoring.")
    if other:
        others = ordered(column for row in other.values() for column in row.accuracies)
        sections += ["## Other scoring, not to be compared with the above", table(list(other.values()), others)]
        sections += [notes(other.values())]
    if differences := compare(rows):
        sections += ["## Differences between models", differences]
    sections += generation_sections(sets, read_published(published, "generations", MEASURES) if sets else [])
    text = "\n\n".join(sections) + "\n"
    print(text)
    if output_file is not None:
        write_atomically(str(output_file.parent), output_file.name, text.encode())
    if picture is not None:
        if not standard:
            raise UserError("there is no result of a standard preset to draw; leave out --picture")
        draw(list(standard.values()), beside, columns, picture)
    if generations_picture is not None:
        if not sets:
            raise UserError("there are no judged continuations to draw; leave out --generations_picture")
        draw_generations(sets[0], generations_picture)


def read_rows(reports: Mapping[Path, dict[str, Any]]) -> dict[Key, Row]:
    """Rows of benchmarks by what they are of.

    Raises:
        UserError: two results of the same.
    """
    rows: dict[Key, Row] = {}
    for path, report in reports.items():
        if "benchmark" not in report:
            continue
        settings = report["settings"]
        made_with = settings["dtype"], settings["max_audio_seconds"], report["codec"]["attention"]
        key = Key(report["model_sha256"], report["preset"], *made_with)
        row = rows.setdefault(key, Row(path.parent.name, {}, {}, {}))
        benchmark = report["benchmark"]
        if benchmark in row.reports:
            raise UserError(f"'{path}' is a second result of {row.name} on {benchmark} ({key.preset}); leave one out")
        row.reports[benchmark] = report
        results = {f"{benchmark}/{part}": result for part, result in report["parts"].items()}
        if report.get("mean_of_parts"):
            results[f"{benchmark}/mean"] = report["mean_of_parts"]
        for column, result in results.items():
            row.accuracies[column] = 100 * result["accuracy"]
            low, high = result["interval"]
            row.intervals[column] = (100 * low, 100 * high)
    weights = {(row.name, key.model_sha256) for key, row in rows.items()}
    for key, row in rows.items():
        is_alone = len([name for name, _ in weights if name == row.name]) == 1
        about = [] if is_alone else [key.model_sha256[:8]]
        about += [key.preset] + ([key.dtype] if key.dtype != "float32" else [])
        about += [f"cut at {key.max_audio_seconds:g} s"] if key.max_audio_seconds != MAX_AUDIO_SECONDS else []
        if (key.codec_attention == "whole") != (key.preset == "original"):  # each preset has its own by default
            about.append(f"codec {key.codec_attention}")
        row.label = f"{row.name} ({', '.join(about)})"
    return rows


def published_rows(path: Path) -> list[Row]:
    """Accuracies of others.

    Raises:
        UserError: as `read_published`.
    """
    return [Row(row.label, row.scores, {}, {}, row.label) for row in read_published(path, "rows", HEADINGS)]


def is_standard(key: Key) -> bool:
    return key.preset in STANDARD and key.max_audio_seconds == MAX_AUDIO_SECONDS


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
    lines += [[row.label, *(cell(row, column) for column in columns)] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def notes(rows: Iterable[Row]) -> str:
    """What must be known beside the numbers: counts, pairs touched by the cut, and rows that do not compare."""
    lines = []
    counts: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    audio: dict[str, set[str]] = defaultdict(set)
    for row, report in [(one, report) for one in rows for report in one.reports.values()]:
        benchmark = report["benchmark"]
        audio[benchmark].add(report["audio_sha256"])
        lines += [f"- {row.label}, {benchmark}: {note}." for note in report["notes"]]
        for part, result in report["parts"].items():
            column = heading(f"{benchmark}/{part}")
            counts[column][f"{result['count']:,}"].append(row.label)
            if result["pairs_cut"]:
                lines.append(
                    f"- {row.label}, {column}: {result['pairs_cut']:,} of {result['pairs']:,} pairs were touched by "
                    f"the cut at {report['settings']['max_audio_seconds']:g} s."
                )
    if not any("touched by the cut" in line for line in lines):
        lines.append("- No pair was touched by the cut.")
    numbers = "; ".join(
        f"{column} " + " or ".join(f"{n} ({', '.join(who)})" if len(by_count) > 1 else n for n, who in by_count.items())
        for column, by_count in counts.items()
    )
    first = [
        f"- In percent, with 95 % intervals (Wilson) of so many words, sentences or pairs: {numbers}. Where rows are "
        "counted (preset original), voices of one word or sentence are taken as independent."
    ]
    lines += [f"- Rows of {name} were scored on different audio." for name, found in audio.items() if len(found) > 1]
    return "\n".join(first + lines)


def compare(rows: Mapping[Key, Row]) -> str:
    """McNemar's test of every two rows under the same scoring on the same audio; empty where there are none."""
    lines, left_out = [], []
    for (key_a, a), (key_b, b) in itertools.combinations(rows.items(), 2):
        if (key_a.preset, key_a.max_audio_seconds) != (key_b.preset, key_b.max_audio_seconds):
            continue
        for benchmark in sorted(a.reports.keys() & b.reports.keys()):
            reports = [row.reports[benchmark] for row in (a, b)]
            # The same audio gives pairs in the same order, whatever they are called in a folder or a table.
            credits_a, credits_b = (credits_in_order(report) for report in reports)
            if reports[0]["audio_sha256"] != reports[1]["audio_sha256"] or credits_a.keys() != credits_b.keys():
                left_out.append(
                    f"{a.label} and {b.label} are not compared on {benchmark}: their audio or parts differ."
                )
                continue
            for part in reports[0]["parts"]:
                of_part = [key for key in credits_a if key[0] == part]
                better = sum(credits_a[key] > credits_b[key] for key in of_part)
                worse = sum(credits_a[key] < credits_b[key] for key in of_part)
                lines.append(
                    f"| {heading(f'{benchmark}/{part}')} | {a.label} | {b.label} | {better:,} | {worse:,} | "
                    f"{sign_test(better, worse):.2g} |"
                )
    header = ["| | A | B | A better | B better | p |", "|---|---|---|---|---|---|"]
    note = (
        "McNemar's exact test, two-sided, not corrected for the number of tests: pairs that one decides better than "
        "the other; where voices are averaged first, words or sentences (a sign test)."
    )
    table = ["\n".join([*header, *lines]), note] if lines else []
    return "\n\n".join([*table, *left_out])


def credits_in_order(report: Mapping[str, Any]) -> dict[tuple[str, int], float]:
    """Credits by part and place."""
    credits = group_credits(report["pairs"], by_group=report["scoring"]["by_group"])
    places: dict[str, int] = defaultdict(int)
    in_order = {}
    for (part, _), value in credits.items():
        in_order[part, places[part]] = value
        places[part] += 1
    return in_order


def draw(rows: Sequence[Row], published: Sequence[Row], columns: Sequence[str], path: Path) -> None:
    """A group of bars for each column: ours with their intervals, then what others have published, hatched.

    Raises:
        UserError: the picture cannot be written.
    """
    groups = [[row for row in (*rows, *published) if column in row.accuracies] for column in columns]
    colors = {row.label: plt.get_cmap("tab20")(i % 20) for i, row in enumerate((*rows, *published))}
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
            axes.barh(y, value, height=0.8, color=colors[row.label], hatch=hatch, edgecolor="white", xerr=error)
            axes.text(max(value, high) + 1, y, f"{value:.1f}", va="center", fontsize=8)
            ticks.append(y)
            labels.append(row.label)
            y += 1
        y += 0.4
    axes.axvline(50, color="black", linewidth=0.8, linestyle=":")
    axes.set(xlim=(0, 108), xlabel="accuracy (%), 95 % interval; hatched: published by others; dotted: chance")
    axes.set_yticks(ticks, labels, fontsize=8)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path, dpi=120)


if __name__ == "__main__":
    run_command(report, __doc__)
