"""Comparison of systems: means with intervals, differences and tests."""

import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
from scipy import stats

from llama_mimi.common.errors import UserError
from llama_mimi.report.document import Picture, Section, Table, to_markdown, write_markdown
from llama_mimi.report.estimates import (
    COMPARABLE,
    SYNTHETIC,
    Estimate,
    by_measure,
    compare,
    estimate,
    proportion,
    same_items,
)
from llama_mimi.report.plots import forest
from llama_mimi.report.results import measure_of, read_results

NOT_COMPARED = ("real_time_factor",)  # depends on the machine
SIGNIFICANCE = 0.05
RULES = "Accuracies with the name of a rule, such as 'level 0', use a further scoring rule (see `eval/README.md`)."
LEGEND = (
    "Accuracies are in percent. A cell begins with a mean over runs (seeds) and n items (pairs, groups of pairs, or "
    "prompts). The brackets contain a 95 % confidence interval (Student's t). The interval includes the variation "
    "between runs and between items, or between speakers if they are known. A cell without brackets has equal values, "
    "too few values, or values of one speaker.",
    "A number with a sign is the difference from the first model. For perplexities, the ratio is shown instead. A "
    "difference uses the items for which both models have values. A cell states the number of items if it is not n.",
)
ONE_RUN = (
    "Each model is one run. One run cannot show the variation between seeds: the intervals include only the variation "
    "between items, and differences do not have stars."
)
LEGEND_OF_STUDIES = (
    *LEGEND,
    f"{RULES} In a row with †, the variance between runs is not pooled. A star marks p ≤ 0.05. P-values of "
    "exploratory differences are adjusted; intervals are not. `config/studies/README.md` explains the statistics "
    "and the tables. Bits of models with different numbers of levels are not comparable.",
)
SUMMARY = (
    "Accuracies are in percent. The brackets contain a 95 % interval over n items: for accuracies, Wilson's interval "
    "over words, sentences or pairs; for other measures, Student's t over prompts, or over speakers if they are known. "
    f"Each system is one run. The preset 'original' counts each voice as a pair. {RULES}"
)


def _by_system(corner: str, cells: Mapping[str, Mapping[str, str]], columns: Sequence[str]) -> list[Table]:
    """Return a table with measures as rows and systems as columns; leave out empty rows and tables.

    If all data are synthetic, only the header is marked as synthetic.
    """
    rows = [[name, *(of.get(column, "") for column in columns)] for name, of in cells.items()]
    rows = [row for row in rows if any(row[1:])]
    if rows and all(SYNTHETIC in row[0] for row in rows):
        corner += " (synthetic data)"
        rows = [[row[0].replace(SYNTHETIC, ""), *row[1:]] for row in rows]
    return [Table([corner, *columns], rows)] if rows else []


def comparison(
    items: pd.DataFrame,
    title: str,
    groups: Mapping[str, Sequence[str]],
    picture: str | None,
    *,
    all_groups: Collection[Sequence[str]] = (),
    primary: tuple[str, str] | None = None,
    costs: Mapping[str, Mapping[str, str]] | None = None,
) -> Section:
    """Return a table of differences from the first variant and, if ``picture`` names a file, a forest plot.

    ``groups`` maps the label of a variant to its systems: one system per seed. Systems may be missing in ``items``.
    The variance between runs is pooled over the variants in ``all_groups`` (default: ``groups``). ``primary`` is the
    measure and the label of the primary difference. ``costs`` are rows without intervals: heading, label and text.
    """
    means: dict[str, dict[str, Estimate]] = {}
    differences: dict[str, dict[str, Estimate]] = {}
    references: dict[str, dict[str, str]] = {}
    is_official: dict[str, bool] = {}  # False for further scoring rules, which are not in the plot
    unpooled = set()
    systems = list(itertools.chain(*groups.values()))
    for heading, measure, rows in by_measure(items[~items["measure"].isin(NOT_COMPARED)], COMPARABLE):
        own, name = rows[rows["system"].isin(systems)].dropna(subset="value"), rows["measure"].iloc[0]
        if own.empty:
            continue
        primary_label = primary[1] if primary and primary[0] == name else None
        found = compare(rows, measure, groups, all_groups or groups.values(), primary_label)
        means[heading], differences[heading], is_unpooled = found
        unpooled |= {heading} if is_unpooled else set()
        is_official[heading] = ":" not in name
        beside = rows[rows["is_reference"] & rows["item"].isin(own["item"])].dropna(subset="value")
        of_references = {str(system): values for system, values in beside.groupby("system")["value"]}
        references[heading] = {name: f"{measure.text(v.mean())} (n = {len(v):,})" for name, v in of_references.items()}
    differences = with_stars(differences)
    cells = {}
    for heading, of_measure in means.items():
        first = next(iter(of_measure.values()), None)
        count, speakers = (first.count, first.clusters) if first else (0, 0)
        about = f" (n = {count:,}{f'; {speakers} speakers' * (speakers < count)})" * (count > 0)
        texts = {}
        for label, mean in of_measure.items():
            number, one = f" (n = {mean.count:,})" * (mean.count != count), differences[heading].get(label)
            texts[label] = mean.text() + number
            if one:
                marks = f", n = {one.count:,}" * (one.count != count) + ", primary" * one.is_primary
                difference = one.text(is_difference=True) + marks + " *" * one.has_star
                texts[label] = f"{mean.text().split()[0]}{number}, {difference}"
        cells[heading + about + " †" * (heading in unpooled)] = texts
    baseline = next(iter(groups))
    alt = f"{title}: difference from {baseline}"
    panels = {heading: of for heading, of in differences.items() if of and is_official[heading]}
    pictures = [Picture(f"{picture}.png", forest(panels, alt, is_difference=True), alt)] if picture and panels else []
    empty = [heading for heading, of in means.items() if not of]
    notes = [f"Measures without a row, because no item has values of all seeds: {', '.join(empty)}."] if empty else []
    tables = _by_system("cost", costs or {}, list(groups))
    tables += _by_system("measure", cells, list(groups))
    names = sorted({name for of in references.values() for name in of})
    tables += _by_system("reference", references, names)
    return Section(title, [*_findings(differences, baseline, primary), *notes], pictures, tables)


def with_stars(differences: Mapping[str, Mapping[str, Estimate]]) -> dict[str, dict[str, Estimate]]:
    """Return the differences with their stars: p <= `SIGNIFICANCE`, for exploratory differences after the adjustment of
    Benjamini and Hochberg. A difference without a p-value does not have a star.
    """
    p_values = {(name, label): one.interval.p_value for name, of in differences.items() for label, one in of.items()}
    tested = [key for key, p in p_values.items() if math.isfinite(p) and not differences[key[0]][key[1]].is_primary]
    adjusted = stats.false_discovery_control([p_values[key] for key in tested]) if tested else []
    p_values |= dict(zip(tested, map(float, adjusted), strict=True))
    return {
        name: {label: replace(one, has_star=p_values[name, label] <= SIGNIFICANCE) for label, one in of.items()}
        for name, of in differences.items()
    }


def _findings(
    differences: Mapping[str, Mapping[str, Estimate]], baseline: str, primary: tuple[str, str] | None
) -> list[str]:
    """Return a sentence with the primary difference, and the number of exploratory differences."""
    texts = []
    if primary:
        (name, label), result = primary, "not available"
        for one in [one for of in differences.values() for one in of.values() if one.is_primary]:
            result = one.text(is_difference=True) + " *" * one.has_star
            p_value, own = one.interval.p_value, one.own_variance_p
            of_own = f", without pooling of variances p = {own:.2g}" * (math.isfinite(own) and own != p_value)
            result += f" (p = {p_value:.2g}{of_own})" if math.isfinite(p_value) else ", no p-value (too few runs)"
        about = f"{measure_of(name).heading}, '{label}' against '{baseline}'"
        texts.append(f"Primary difference: {about}: {result}.")
    exploratory = [one for of in differences.values() for one in of.values() if not one.is_primary]
    tested = [one for one in exploratory if math.isfinite(one.interval.p_value)]
    if tested:
        stars = sum(one.has_star for one in tested)
        texts.append(f"{len(tested)} exploratory differences; {stars} {'has' if stars == 1 else 'have'} a star.")
    return texts


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
            found = {system: proportion(values, measure) for system, values in of_each.items()}
            notes += [f"{heading}: systems were scored on different audio."] if rows["data"].nunique() > 1 else []
        else:
            values, left_out = same_items(rows)
            found = {system: estimate(values[[system]], measure) for system in values} if len(values) else {}
            notes += [f"{heading}: {left_out:,} samples are excluded (a system has no value)."] if left_out else []
        if found:
            counts = sorted({f"{mean.count:,}" for mean in found.values()})
            cells[f"{heading} (n = {' or '.join(counts)})"] = {system: mean.text() for system, mean in found.items()}
            panels |= {heading: found} if ":" not in rows["measure"].iloc[0] else {}  # without further scoring rules
    columns = items.sort_values("is_reference", kind="stable")["system"].unique()
    pictures = [Picture(f"{picture}.png", forest(panels, title), title)] if picture and panels else []
    return Section(title, [SUMMARY], pictures, _by_system("measure", cells, columns), notes)


def comparable_sets(items: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Group results by settings, and continuations also by prompts; yield the title and the rows of each group."""
    is_benchmark = items["measure"].map(lambda name: measure_of(name).is_accuracy).astype(bool)
    for conditions, some in items[is_benchmark].groupby("conditions", sort=False):
        yield f"Accuracy, preset {conditions}", some
    for (conditions, _), some in items[~is_benchmark].groupby(["conditions", "data"], sort=False):
        tasks = set(some["measure"].str.split("/").str[0])
        speech = "Speech of texts" if "tts" in tasks else "Continuations"
        yield f"{'Transcripts' if 'asr' in tasks else speech}, {conditions}", some


def report_results(results: Sequence[Path], output_file: Path | None) -> None:
    """Write the report of scripts/report.py to a file; if ``output_file`` is None, print the report."""
    items = read_results(results)
    if items.empty:
        raise UserError(f"result files are missing in {', '.join(map(str, results))}; run the scripts in eval/ first")
    sections: list[Section] = []
    for number, (title, some) in enumerate(comparable_sets(items), 1):
        picture = f"{output_file.stem}-{number}" if output_file else None
        sections.append(summary(some, title, picture))
        groups = {system: [system] for system in some["system"][~some["is_reference"]].unique()}
        if len(groups) > 1:
            sections.append(comparison(some, f"Differences, {title}", groups, picture and f"{picture}-differences"))
    legend = (*LEGEND, ONE_RUN) if any(section.title.startswith("Differences") for section in sections) else ()
    sections = [Section("Results", legend), *sections]
    if output_file is None:
        return print(to_markdown(sections))
    write_markdown(sections, output_file)
    print(f"written to {output_file}")
