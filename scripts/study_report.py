"""The report of a study: its tables, what stands beside them, and pictures of the trade-offs."""

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from generations import MEASURES
from matplotlib.axes import Axes
from pictures import save
from published import AXES_OF_OTHERS, Published, read_published
from report import HEADINGS
from study_results import Lines, Measured, Results, digits_of, heading_of

from llama_mimi.common.files import write_atomically
from llama_mimi.study.config import Run, Study, Table, Variant
from llama_mimi.study.run import INDEX
from llama_mimi.training.metrics import BITS

REPORT = "report.md"
PUBLISHED = Path("eval/published.toml")
MARKERS = "osD^vPX"  # of arms, beside their color
LINGUISTIC = ("sLM21/", "sStoryCloze/")  # beginnings of columns


@dataclass(frozen=True)
class Cell:
    """Text, with links from the study's folder by what they are called."""

    text: str
    links: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Section:
    """A part of the report.

    Args:
        texts: paragraphs, with commands and files between backticks.
        items: of a list.
        tables: rows of cells, of which the first are the headings.
        picture: file in the study's folder.
    """

    title: str
    texts: list[str] = field(default_factory=list)
    items: list[str] = field(default_factory=list)
    tables: list[list[list[Cell]]] = field(default_factory=list)
    picture: str | None = None

    @property
    def seen(self) -> str:
        """What the picture shows."""
        return f"{self.title}: fidelity against linguistic scores"


def write_report(study: Study, lines: Lines) -> Path:
    """Write the report and its pictures into the study's folder, and return its path.

    Raises:
        UserError: a result cannot be read, or something cannot be written.
    """
    parts = []
    for number, section in enumerate(sections(study, lines)):
        parts += [f"{'#' * min(number + 1, 2)} {inert(section.title)}", *section.texts]
        parts += ["\n".join(f"- {inert(item)}" for item in section.items)] if section.items else []
        parts += map(markdown, section.tables)
        parts += [f"![{inert(section.seen)}]({section.picture})"] if section.picture else []
    content = "\n\n".join(parts) + "\n"
    write_atomically(str(study.output_dir), REPORT, content.encode())
    return study.output_dir / REPORT


def inert(text: str) -> str:
    """Text, such as of an error, that is no Markdown."""
    return re.sub(r"([\\`*_|<>\[\]~&])", r"\\\1", " ".join(text.split()))


def markdown(rows: Sequence[Sequence[Cell]]) -> str:
    def of_cell(cell: Cell) -> str:
        return " ".join([inert(cell.text), *(f"[{name}]({quote(path)})" for name, path in cell.links.items())])

    lines = [[of_cell(cell) for cell in row] for row in rows]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def sections(study: Study, lines: Lines) -> list[Section]:
    """What the report says; pictures are drawn on the way."""
    results = Results(study, lines)
    commits = sorted({line["commit"] for line in lines if line["commit"]})
    done = sum(line["state"] == "done" for line in lines)
    about = (
        f"`uv run python scripts/study.py {study.path}`: {done} of {len(lines)} runs, {_size(study)}; "
        f"commit {', '.join(commits) or 'unknown'}. `{INDEX}` has the data, the settings and the cost of each run."
    )
    found = [Section(f"Study {study.name}", [about, *([study.note] if study.note else []), *LEGEND])]
    if without := [line["run"] for line in lines if line["state"] == "done" and not line.get(BITS)]:
        who = "any run" if len(without) == len(lines) else ", ".join(without)
        found[0].texts.append(
            f"There are no {heading_of(BITS)} of {who}: earlier versions logged only bits/s over the whole vocabulary, "
            "which do not compare."
        )
    if holes := [line for line in lines if line["state"] != "done"]:
        found.append(Section("Not there", items=[f"{line['run']}: {_why(line)}" for line in holes]))
    for number, table in enumerate(study.tables, 1):
        picture = study.output_dir / f"tradeoff-{number}.png"
        is_drawn = draw(results, table, picture)
        tables = [rows for rows in (arms_table(results, table), differences(results, table)) if len(rows) > 1]
        texts = []
        if gone := [heading_of(column) for column in results.columns if results.is_gone(table.variants, column)]:
            texts.append(
                f"No pair or prompt has a value of all arms here, so that there is no row of: {', '.join(gone)}."
            )
        found.append(Section(table.title, texts, tables=tables, picture=picture.name if is_drawn else None))
    if len(rows := published_table(results)) > 1:
        text = "By their own scoring, on the whole benchmarks and on their own prompts."
        found.append(Section("Published by others", [text], tables=[rows]))
    return found


LEGEND = (
    "Accuracies are in percent. A cell has the mean over seeds and a link to the result of each seed. Brackets: 95 % "
    "bootstrap interval over pairs or prompts. ±: half of the 95 % interval over seeds (Student's t; for perplexities "
    "a factor). Each row uses only the n pairs, groups of pairs or prompts that every model has a value for. Bits are "
    "over the tokens that can stand at a position: the codes of its level and, between frames, `</audio>`. Bits of "
    "models with different numbers of levels do not compare. The last column has the means of the references on the "
    "same prompts. It also has published results of models of the same kind and any size, by the authors' own scoring "
    "and on their own data.",
    "Differences are taken pair by pair and seed by seed. A star marks a difference where both intervals exclude zero "
    "(for a ratio: one). There is no star with one seed, or where all seeds or pairs have the same difference. Some of "
    "many differences have a star by chance.",
)


def _size(study: Study) -> str:
    seeds, variants = len(study.seeds), len(study.variants)
    return f"{seeds} seed{'s' * (seeds != 1)} of {variants} arm{'s' * (variants != 1)}"


def _why(line: Mapping[str, Any]) -> str:
    failed = line["failed"]
    return f"{failed['step']} failed: {failed['why']}" if failed else "not finished"


def arms_table(results: Results, table: Table) -> list[list[Cell]]:
    """Measures by arms, with what stands beside: references of continuations, and published rows of such arms."""
    own = [{(axis, getattr(arm, axis)) for axis in AXES_OF_OTHERS} for arm in table.variants]
    of_others = [row for row in published() if row.arm and any(row.arm.items() <= axes for axes in own)]
    rows = [
        [Cell(text) for text in ("measure", *map(table.label, table.variants), "references, and published by others")]
    ]
    for column in results.columns:
        if not (found := results.measured(table.variants, column)):
            continue
        beside = "; ".join(f"{row.label}: {_plain(row.scores, column)}" for row in of_others if column in row.scores)
        first = next(iter(found.values()))
        prompts = next(iter(first.parts_of_seeds.values()), [{}])[0]
        links = {
            f"{name} {mean:.{digits_of(column)}f}": path
            for name, (path, mean) in results.references(column, prompts).items()
        }
        cells = [cell(results, arm, column, found) for arm in table.variants]
        heading = heading_of(column) + (f" (n = {first.count:,})" if first.count else "")
        rows.append([Cell(heading), *cells, Cell(beside, links)])
    return rows


def _plain(scores: Mapping[str, float], column: str) -> str:
    return f"{scores[column]:.{digits_of(column)}f}"


def cell(results: Results, arm: Variant, column: str, found: Mapping[Variant, Measured]) -> Cell:
    if arm not in found:
        return Cell("")
    measured = found[arm]
    paths = {seed: results.path(Run(arm, seed), column) for seed in measured.of_seeds}
    links = {str(seed): path for seed, path in paths.items() if path} if column != BITS else {"index": INDEX}
    return Cell(measured.text(digits_of(column)), links)


def differences(results: Results, table: Table) -> list[list[Cell]]:
    """How the arms differ from the first."""
    first, *others = table.variants
    rows = [[f"difference from {table.label(first)}", *map(table.label, others)]]
    for column in results.columns:
        found = results.measured(table.variants, column)
        # Bits are of other levels where Q differs.
        comparable = [arm for arm in others if column != BITS or arm.num_quantizers == first.num_quantizers]
        of_arms = {arm: found[arm].minus(found[first]) for arm in comparable if first in found and arm in found}
        if any(difference.of_seeds for difference in of_arms.values()):
            texts = (
                of_arms[arm].text(digits_of(column), is_difference=True) if arm in of_arms else "" for arm in others
            )
            is_ratio = any(difference.shown is math.exp for difference in of_arms.values())
            rows.append([heading_of(column) + (" (ratio)" if is_ratio else ""), *texts])
    return [[Cell(text) for text in row] for row in rows]


@cache
def published() -> list[Published]:
    return [*read_published(PUBLISHED, "rows", HEADINGS), *read_published(PUBLISHED, "generations", MEASURES)]


def published_table(results: Results) -> list[list[Cell]]:
    """All that others have published of the same columns."""
    columns = [column for column in results.columns if any(column in row.scores for row in published())]
    rows = [[Cell(text) for text in ("", *map(heading_of, columns))]]
    for row in published():
        if row.scores.keys() & {*columns}:
            texts = (_plain(row.scores, column) if column in row.scores else "" for column in columns)
            rows.append([Cell(row.label), *map(Cell, texts)])
    return rows


def draw(results: Results, table: Table, path: Path) -> bool:
    """Fidelity (acoustic consistency, similarity of voices) against linguistic scores; False where there are none."""
    columns = results.columns
    linguistic = [column for column in columns if column.startswith(LINGUISTIC)]
    acoustic = [[c for c in columns if c == "salmon/mean"] or [c for c in columns if c.startswith("salmon/")]]
    panels = [some for some in (*acoustic, [c for c in columns if c == "similarity"]) if some]
    if not linguistic or not panels:
        return False
    figure, grid = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 4.2), squeeze=False, layout="constrained")
    for axes, some in zip(grid[0], panels, strict=True):
        _scatter(axes, results, table, some, linguistic)
    grid[0][0].set_ylabel("linguistic: mean of " + ", ".join(map(heading_of, linguistic)) + " (%)", fontsize=8)
    shown = {label: handle for axes in grid[0] for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if shown:
        figure.legend([*shown.values()], [*shown], loc="outside upper center", ncols=3, fontsize=8)
        save(figure, path, dpi=110)
    plt.close(figure)
    return bool(shown)


def _scatter(axes: Axes, results: Results, table: Table, horizontal: Sequence[str], vertical: Sequence[str]) -> None:
    """A large point an arm, the mean, and a small one for each of its seeds."""
    x, y = ([results.measured(table.variants, column) for column in columns] for columns in (horizontal, vertical))
    colors = plt.get_cmap("tab10")
    for number, arm in enumerate(table.variants):
        look: dict[str, Any] = {"color": colors(number % 10), "marker": MARKERS[number % len(MARKERS)], "linestyle": ""}
        if not all(arm in found for found in (*x, *y)):
            continue
        seeds = sorted(set.intersection(*(set(found[arm].of_seeds) for found in (*x, *y))))
        if not seeds:
            continue
        points = [
            [statistics.mean(found[arm].shown(found[arm].of_seeds[seed]) for found in some) for seed in seeds]
            for some in (x, y)
        ]
        axes.plot(*points, **look, markersize=3.5, alpha=0.6)
        means = [statistics.mean(values) for values in points]
        axes.plot(*means, **look, markersize=9, label=table.label(arm))
    name = (
        "SALMon: mean of " + ", ".join(map(heading_of, horizontal))
        if len(horizontal) > 1
        else heading_of(horizontal[0])
    )
    axes.set_xlabel(f"fidelity: {name}", fontsize=8)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
