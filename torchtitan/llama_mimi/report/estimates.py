"""Means of systems and their differences, with uncertainty."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pandas as pd
from tqdm import tqdm

from llama_mimi.evaluation.statistics import (
    Interval,
    RunVariance,
    crossed_interval,
    pooled_run_variance,
    wilson_interval,
)
from llama_mimi.report.results import NO_SAMPLE, SALMON, SALMON_MEAN, MeasureFormat, in_order, measure_of

COMPARABLE = ["measure", "conditions", "data", "data_kind"]
SYNTHETIC = ", synthetic"  # ending of a heading


@dataclass(frozen=True)
class Estimate:
    """A mean over runs and items, or a difference of two means, in the units of a report. Perplexities: logarithms."""

    measure: MeasureFormat
    interval: Interval
    seeds: tuple[float, ...]  # mean of each run; for a difference, minus the mean of all runs of the baseline
    count: int  # number of items; 0 for measures without items, such as bits/s
    clusters: int  # number of speakers, or of items if the speakers are not known
    is_primary: bool = False  # True for the difference that the study file names
    own_variance_p: float = math.nan  # p-value of the primary difference without pooling of the variance between runs
    has_star: bool = False

    def text(self, *, is_difference: bool = False) -> str:
        """Return the mean and its interval as text. A difference has a sign or is a ratio."""
        is_log = self.measure.is_log
        form = f"{'+' if is_difference and not is_log else ''}z.{self.measure.digits + (is_difference and is_log)}f"
        mean, low, high = (f"{math.exp(value) if is_log else value:{form}}" for value in self.interval[:3])
        text = ("ratio " if is_difference and is_log else "") + mean
        return f"{text} ({low} to {high})" if math.isfinite(self.interval.low) else text


def estimate(
    values: pd.DataFrame,
    measure: MeasureFormat,
    baseline: pd.DataFrame | None = None,
    run_variance: RunVariance | None = None,
) -> Estimate:
    """Return the mean of ``values`` or, if ``baseline`` is given, the difference of the two means.

    The tables have the same rows (part, item, cluster) and a column for each run; see `same_items`. ``run_variance``
    is the variance of run means in the units of the report; default: computed from the given runs.
    """
    runs, of_baseline = run_means(values, measure), 0.0
    if baseline is not None:
        of_baseline = float(np.mean(run_means(baseline, measure)))
    parts, items, clusters = (values.index.get_level_values(level) for level in ("part", "item", "cluster"))
    clusters = parts + "/" + clusters
    interval = crossed_interval(
        values.to_numpy().T * measure.factor,
        None if baseline is None else baseline.to_numpy().T * measure.factor,
        strata_N=parts.to_numpy(),
        clusters_N=clusters.to_numpy(),
        run_variance=run_variance,
    )
    if baseline is None and (measure.is_error_rate or measure.factor == 100):  # 100: an accuracy or another fraction
        high = interval.high if measure.is_error_rate else min(interval.high, 100.0)
        interval = interval._replace(low=max(interval.low, 0.0), high=high)
    seeds, count = tuple(run - of_baseline for run in runs), len(items) if items[0] else 0
    if count == 1:  # not a measure without items, so the variation between items is unknown
        interval = Interval(interval.mean, math.nan, math.nan, math.nan)
    return Estimate(measure, interval, seeds, count, clusters.nunique())


def compare(
    rows: pd.DataFrame,
    measure: MeasureFormat,
    groups: Mapping[str, Sequence[str]],
    all_groups: Iterable[Sequence[str]],
    primary: str | None,
) -> tuple[dict[str, Estimate], dict[str, Estimate], bool]:
    """Return the mean of each variant, its difference from the first variant, and True if the variance is not pooled.

    ``groups`` maps the label of a variant to its systems: one system per run. The variance between runs is pooled over
    the variants in ``all_groups``, if their variances do not differ. A mean uses the items for which all runs of the
    variant have a value, and a difference uses the items for which all runs of both variants have a value. ``primary``
    is the label of the variant with the primary difference, if this measure has the primary difference.
    """

    @cache
    def values_of(*systems: str) -> pd.DataFrame:
        return same_items(rows[rows["system"].isin(systems)])[0]

    runs = [run_means(values, measure) for systems in all_groups if len(values := values_of(*systems))]
    pooled = pooled_run_variance(runs)
    values = {label: some for label, systems in groups.items() if len(some := values_of(*systems))}
    means = {label: estimate(some, measure, None, pooled) for label, some in values.items()}
    differences = {}
    baseline = next(iter(groups))
    for label in [label for label in values if label != baseline and baseline in values]:
        both = values_of(*groups[label], *groups[baseline])
        if len(both):
            first, second = (both[both.columns.intersection(groups[name])] for name in (label, baseline))
            differences[label] = estimate(first, measure, second, pooled)
            if label == primary:
                own = estimate(first, measure, second).interval.p_value
                differences[label] = replace(differences[label], is_primary=True, own_variance_p=own)
    return means, differences, pooled is None and max(map(len, runs), default=0) > 1


def run_means(values: pd.DataFrame, measure: MeasureFormat) -> list[float]:
    """Return the mean of each run, in the units of the report. All parts have the same weight."""
    return [float(mean) for mean in values.groupby(level="part").mean().mean() * measure.factor]


def proportion(values: pd.DataFrame, measure: MeasureFormat) -> Estimate:
    """Return the accuracy of one run with Wilson's interval, as in `mean_of_parts`."""
    (mean,) = run_means(values, measure)
    sizes = values.groupby(level="part").size()
    low, high = wilson_interval(mean / measure.factor, len(sizes) ** 2 / sum(1 / size for size in sizes))
    interval = Interval(mean, low * measure.factor, high * measure.factor, math.nan)
    return Estimate(measure, interval, (mean,), sum(sizes), sum(sizes))


def same_items(rows: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """Return a table with rows (part, item, cluster) and columns (system), and the number of excluded samples.

    A sample is excluded if a system lacks a value for it. Systems without any value are ignored. A reference has one
    sample for each item; this sample is compared with each sample of a model.
    """
    systems = list(rows.dropna(subset="value")["system"].unique())
    if not systems:
        return pd.DataFrame(), 0
    keys, is_single = ["part", "item", "cluster", "sample"], rows["sample"] == NO_SAMPLE
    if not is_single.all():
        samples = rows.loc[~is_single, keys].drop_duplicates()
        rows = pd.concat([rows[~is_single], rows[is_single].drop(columns="sample").merge(samples)])
    kept = rows.pivot_table("value", keys, "system", sort=False)[systems].dropna()
    return kept.groupby(level=keys[:-1], sort=False).mean(), len(rows[keys].drop_duplicates()) - len(kept)


def by_measure(items: pd.DataFrame, keys: list[str]) -> Iterator[tuple[str, MeasureFormat, pd.DataFrame]]:
    """Yield heading, format and rows for each measure and combination of keys, and for the mean of SALMon's parts.

    The parts of SALMon under a rule, such as `salmon/rir_consistency:level_0`, are yielded only if a part is missing.
    A heading marks synthetic data. If a measure has several conditions or data sets, the heading names them.
    """
    items = items.assign(part=items["measure"], rule=items["measure"].str.replace("^[^:]*", "", regex=True))
    salmon = items[items["measure"].str.replace(":.*", "", regex=True).isin(SALMON)]
    of_mean = ["system", "conditions", "data", "rule"]
    whole = salmon[salmon.groupby(of_mean)["measure"].transform("nunique") == len(SALMON)]
    items = items.drop(whole.index[whole["rule"] != ""])
    items = pd.concat([items, whole.assign(measure=SALMON_MEAN + whole["rule"])])
    for name in tqdm(in_order(items["measure"]), "intervals", unit="measure", delay=2, leave=False):
        of_measure = items[items["measure"] == name]
        for _, rows in of_measure.groupby(keys, sort=False):
            heading = measure_of(name).heading
            for key in ("conditions", "data"):
                if key in keys and of_measure[key].nunique() > 1:
                    heading += f", {rows[key].iloc[0]}" if key == "conditions" else f", data {rows[key].iloc[0][:8]}"
            yield heading + SYNTHETIC * bool(rows["data_kind"].iloc[0] == "synthetic"), measure_of(name), rows
