"""The part of scripts/report.py that is of eval/generation.py: tables, differences and a picture of judged samples."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from pictures import save
from published import Published

from llama_mimi.common.errors import UserError
from llama_mimi.judging.table import COLUMNS, KIND, column_of, columns_in, differences, is_reference, means, table

MEASURES = (*COLUMNS, "judge/")  # that a row of others may have
Systems = dict[str, list[dict[str, Any]]]


def read_generations(reports: Mapping[Path, Mapping[str, Any]]) -> list[Systems]:
    """Samples by system, for each set of results of the same prompts, measures and length.

    Args:
        reports: contents of result files by path; those of another kind are passed over.

    Raises:
        UserError: two results of one system.
    """
    sets: dict[str, Systems] = defaultdict(dict)
    heard: dict[tuple[str, str], str] = {}
    for path, report in reports.items():
        if report.get("kind") != KIND:
            continue
        key = json.dumps([report["prompts_sha256"], report["seconds"], report["measures"]], sort_keys=True)
        audio = key, report["system"]
        if audio in heard and heard[audio] == report["audio_sha256"]:
            continue  # references of two folders
        if audio in heard:
            raise UserError(f"'{path}' is a second result of '{report['system']}' on the same prompts; leave one out")
        heard[audio] = report["audio_sha256"]
        sets[key][report["system"]] = report["samples"]
    return [dict(sorted(systems.items(), key=_references_last)) for systems in sets.values()]


def _references_last(system: tuple[str, list[dict[str, Any]]]) -> tuple[bool, str]:
    name, samples = system
    return is_reference(samples), name


def sections(sets: Sequence[Systems], published: Sequence[Published]) -> list[str]:
    """Markdown of each set: a table, and how its systems differ."""
    parts = []
    for number, systems in enumerate(sets, 1):
        title = "## Continuations" + (f", set {number} (other prompts or other measures)" if len(sets) > 1 else "")
        columns = set(columns_in(systems))
        beside = [(row.label, row.scores) for row in published if row.scores.keys() & columns]
        parts += [title, table(systems, beside)]
        if beside:
            parts.append("Rows with a source in brackets are numbers of others, of other prompts and by other models.")
        if found := differences(systems):
            parts += ["### Differences on the same prompts (paired bootstrap, not corrected for their number)", found]
    return parts


def draw_generations(systems: Systems, path: Path) -> None:
    """A panel for each measure: means of all systems with their intervals.

    Raises:
        UserError: the picture cannot be written.
    """
    results = means(systems)
    num_columns = min(4, len(results))
    num_rows = -(-len(results) // num_columns)
    size = (1.2 + 2.6 * num_columns, num_rows * (0.9 + 0.3 * len(systems)))
    figure, grid = plt.subplots(num_rows, num_columns, figsize=size, sharey=True, squeeze=False, layout="constrained")
    places = {system: place for place, system in enumerate(systems)}
    colors = plt.get_cmap("tab10")
    for axes, (name, of_system) in zip(grid.flat, results.items(), strict=False):
        for system, result in of_system.items():
            low, high = result["interval"]
            mean, place = result["mean"], places[system]
            axes.plot([low, high], [place, place], color=colors(place % 10), linewidth=2)
            axes.plot(mean, place, "o", color=colors(place % 10))
        axes.set_title(column_of(name).heading, fontsize=10)
        axes.set_yticks(list(places.values()), list(places))
        axes.set_ylim(len(systems) - 0.5, -0.5)
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(grid.flat)[len(results) :]:
        axes.set_visible(False)
    save(figure, path, dpi=120)
