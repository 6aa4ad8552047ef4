"""Comparison of systems: means with intervals, differences and tests."""

import itertools
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pandas as pd

from llama_mimi.common.errors import UserError
from llama_mimi.common.versions import ROOT
from llama_mimi.evaluation.statistics import sign_test
from llama_mimi.report.document import Picture, Section, Table, to_markdown, write_markdown
from llama_mimi.report.estimates import COMPARABLE, SYNTHETIC, Estimate, by_measure, estimate, same_items
from llama_mimi.report.plots import forest, tradeoff
from llama_mimi.report.results import SALMON, SALMON_MEAN, measure_of, read_results

NOT_COMPARED = ("real_time_factor", "seconds")  # real-time factors depend on the machine; longer is not better
PUBLISHED = ROOT / "eval" / "published.toml"
LEGEND = (
    "Accuracies are in percent. Each cell begins with the mean over seeds. The brackets contain a 95 % bootstrap "
    "interval over n items (pairs, groups of pairs, or prompts). A row uses only the items for which all models in the "
    "row have a value. The number after ± is half the width of the 95 % interval over seeds (Student's t).",
    "A number with a sign is the mean difference from the first model, over pairs and seeds. For perplexities, the "
    "ratio is shown instead. A star marks a difference if both intervals exclude zero (or one, for a ratio). A "
    "difference has no star if it has only one seed, or the same value for all seeds or pairs. Among many differences, "
    "some have a star by chance.",
)
SUMMARY = (
    "Accuracies are in percent. The brackets contain a 95 % interval: for accuracies, Wilson's interval over n words, "
    "sentences or pairs; for other measures, a bootstrap interval over n prompts. The preset 'original' counts each "
    "voice as a pair."
)


def _by_system(corner: str, cells: Mapping[str, Mapping[str, str]], columns: Sequence[str]) -> list[Table]:
    """Return a table with measures as rows and systems as columns; leave out empty rows and tables."""
    rows = [[name, *(of.get(column, "") for column in columns)] for name, of in cells.items()]
    rows = [row for row in rows if any(row[1:])]
    return [_table([corner, *columns], rows)] if rows else []


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Return a table of measures. If all data are synthetic, only the header is marked as synthetic."""
    if all(SYNTHETIC in row[0] for row in rows):
        header = [f"{header[0]} (synthetic data)", *header[1:]]
        rows = [[row[0].replace(SYNTHETIC, ""), *row[1:]] for row in rows]
    return Table(header, rows)


def comparison(items: pd.DataFrame, title: str, groups: Mapping[str, Sequence[str]], picture: str | None) -> Section:
    """Return a table of differences from the first variant and, if ``picture`` names a file, a forest plot.

    ``groups`` maps the label of a variant to its systems: one system per seed, in the order of seeds. Systems may be
    missing in ``items``.
    """
    places = {system: (label, seed) for label, systems in groups.items() for seed, system in enumerate(systems)}
    baseline = next(iter(groups))
    cells: dict[str, dict[str, str]] = {}
    references: dict[str, dict[str, str]] = {}
    panels: dict[str, dict[str, Estimate]] = {}
    empty = []
    for heading, measure, rows in by_measure(items[~items["measure"].isin(NOT_COMPARED)], COMPARABLE):
        own = rows[rows["system"].isin(places)]
        values, _ = same_items(own)
        if values.empty:
            empty += [heading] if len(own) else []
            continue
        values.columns = pd.MultiIndex.from_tuples([places[system] for system in values])
        means = {label: estimate(values[label], measure) for label in groups if label in values}
        texts = {label: mean.text() for label, mean in means.items()}
        differences = {}
        for label in [label for label in means if label != baseline and baseline in means]:
            difference = (values[label] - values[baseline]).dropna(axis="columns")  # only seeds that both variants have
            if not difference.empty:
                differences[label] = estimate(difference, measure)
                mean_alone = texts[label].split()[0]
                texts[label] = f"{mean_alone}, {differences[label].text(is_difference=True)}"
        cells[heading + (f" (n = {n:,})" if (n := next(iter(means.values())).count) else "")] = texts
        panels |= {heading: differences} if differences else {}
        beside = rows[rows["is_reference"] & rows["item"].isin(values.index.unique("item"))].dropna(subset="value")
        means_of_references = beside.groupby("system")["value"].mean().items()
        references[heading] = {str(system): measure.text(mean) for system, mean in means_of_references}
    alt = f"{title}: difference from {baseline}"
    pictures = [Picture(f"{picture}.png", forest(panels, alt, is_difference=True), alt)] if picture and panels else []
    notes = [f"Measures without a row, because no item has values of all models: {', '.join(empty)}."] if empty else []
    names = sorted({name for of in references.values() for name in of})
    of_references = _by_system("references on the same prompts", references, names)
    return Section(title, notes, pictures, _by_system("measure", cells, list(groups)) + of_references)


def summary(items: pd.DataFrame, title: str, picture: str | None = None) -> Section:
    """Return a table of the means of all systems, notes and, if ``picture`` names a file, a forest plot.

    Accuracies use all pairs of a system. Other measures use only the samples for which all systems have a value.
    """
    cells: dict[str, dict[str, str]] = {}
    panels: dict[str, dict[str, Estimate]] = {}
    notes = []
    for heading, measure, rows in by_measure(items, ["measure", "data_kind"]):
        systems = list(rows["system"].unique())
        if measure.is_accuracy:
            of_each = {system: same_items(rows[rows["system"] == system])[0] for system in systems}
            found = {system: estimate(values, measure, is_wilson=True) for system, values in of_each.items()}
            notes += [f"{heading}: systems were scored on different audio."] if rows["data"].nunique() > 1 else []
        else:
            values, left_out = same_items(rows)
            found = {system: estimate(values[[system]], measure) for system in values} if len(values) else {}
            notes += [f"{heading}: {left_out:,} samples are excluded (a system has no value)."] if left_out else []
            empty = [system for system in systems if system not in values]
            notes += [f"{heading}: no value for {', '.join(empty)}."] if empty else []
        if found:
            counts = sorted({f"{mean.count:,}" for mean in found.values()})
            cells[f"{heading} (n = {' or '.join(counts)})"] = {system: mean.text() for system, mean in found.items()}
            panels[heading] = found
    columns = items.sort_values("is_reference", kind="stable")["system"].unique()
    pictures = [Picture(f"{picture}.png", forest(panels, title), title)] if picture and panels else []
    return Section(title, [SUMMARY], pictures, _by_system("measure", cells, columns), notes)


def sign_tests(items: pd.DataFrame, title: str) -> list[Section]:
    """Return a table of McNemar's exact tests, one for each pair of systems on the same data."""
    lines = []
    for heading, measure, rows in by_measure(items, COMPARABLE):
        if measure.is_accuracy and rows["measure"].iloc[0] != SALMON_MEAN:
            for a, b in itertools.combinations(rows["system"].unique(), 2):
                values, _ = same_items(rows[rows["system"].isin([a, b])])
                better, worse = int((values[a] > values[b]).sum()), int((values[a] < values[b]).sum())
                lines.append([heading, a, b, f"{better:,}", f"{worse:,}", f"{sign_test(better, worse):.2g}"])
    text = "A better (B better): number of pairs or groups on which A (B) is better. p: McNemar's exact test."
    header = ["measure", "A", "B", "A better", "B better", "p"]
    return [Section(title, [text], tables=[_table(header, lines)])] if lines else []


def comparable_sets(items: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Group results by settings, and continuations also by prompts; yield the title and the rows of each group."""
    is_benchmark = items["measure"].map(lambda name: measure_of(name).is_accuracy).astype(bool)
    for conditions, some in items[is_benchmark].groupby("conditions", sort=False):
        yield f"Accuracy, preset {conditions}", some
    for (conditions, _), some in items[~is_benchmark].groupby(["conditions", "data"], sort=False):
        yield f"Continuations, {conditions}", some


def published_numbers(items: pd.DataFrame) -> list[Section]:
    """Return a table of published numbers for the measures of ``items`` that were computed on official data."""
    if not (items["data_kind"] == "official").any():
        return []
    rows = tomllib.loads(PUBLISHED.read_text())["rows"]
    scores = {row["model"]: row["scores"] for row in rows}
    sources = {row["model"]: f"{row['model']}: {row['source']}" for row in rows}
    cells: dict[str, dict[str, str]] = {}
    for heading, measure, rows in by_measure(items[items["data_kind"] == "official"], ["measure"]):
        name = rows["measure"].iloc[0]
        cells[heading] = {model: f"{of[name]:.{measure.digits}f}" for model, of in scores.items() if name in of}
    models = [model for model in scores if any(model in of for of in cells.values())]
    text = "The authors of each source have computed these numbers with their own scoring."
    found = _by_system("measure", cells, models)
    return [Section("Published by others", [text], (), found, [sources[model] for model in models])] if found else []


def tradeoffs(items: pd.DataFrame, title: str, groups: Mapping[str, Sequence[str]], name: str) -> list[Picture]:
    """Return a plot of fidelity (SALMon, speaker similarity) against linguistic scores. See `comparison` for groups."""
    means: dict[str, pd.Series] = {}
    own = items[items["system"].isin([system for some in groups.values() for system in some])]
    for _, measure, rows in by_measure(own, COMPARABLE):
        values, _ = same_items(rows)
        if len(values):
            means.setdefault(rows["measure"].iloc[0], values.groupby(level="part").mean().mean() * measure.factor)
    table = pd.DataFrame(means)
    vertical = [column for column in table if column.startswith(("sLM21/", "sStoryCloze/"))]
    salmon = [column for column in table if column == SALMON_MEAN] or [column for column in table if column in SALMON]
    panels = {}
    for horizontal in (salmon, [column for column in table if column == "similarity"]):
        axes = [table[some].mean(axis=1, skipna=False) for some in (horizontal, vertical)]
        points = pd.concat(axes, axis=1).dropna()
        seeds = {label: [tuple(points.loc[s]) for s in some if s in points.index] for label, some in groups.items()}
        if scored := {label: some for label, some in seeds.items() if some}:
            panels[_mean_of(horizontal)] = scored
    alt = f"{title}: fidelity against linguistic scores{' (synthetic)' * ('synthetic' in set(own['data_kind']))}"
    return [Picture(f"{name}.png", tradeoff(panels, _mean_of(vertical), alt), alt)] if panels else []


def _mean_of(names: Sequence[str]) -> str:
    return ("mean of " if len(names) > 1 else "") + ", ".join(measure_of(name).heading for name in names)


def report_results(results: Sequence[Path], output_file: Path | None) -> None:
    """Write the report of scripts/report.py to a file; if ``output_file`` is None, print the report."""
    found = read_results(results)
    if found.items.empty:
        raise UserError(f"result files are missing in {', '.join(map(str, results))}; run the scripts in eval/ first")
    sections: list[Section] = []
    for number, (title, items) in enumerate(comparable_sets(found.items), 1):
        picture = f"{output_file.stem}-{number}" if output_file else None
        sections.append(summary(items, title, picture))
        groups = {system: [system] for system in items["system"][~items["is_reference"]].unique()}
        if len(groups) > 1:
            sections.append(comparison(items, f"Differences, {title}", groups, picture and f"{picture}-differences"))
            sections += sign_tests(items, f"Tests, {title}")
    legend = LEGEND if any(section.title.startswith("Differences") for section in sections) else ()
    sections = [Section("Results", legend, items=found.notes), *sections, *published_numbers(found.items)]
    if output_file is None:
        return print(to_markdown(sections))
    write_markdown(sections, output_file)
    print(f"written to {output_file}")
