"""Means of systems on the same pairs or prompts, with uncertainty."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from tqdm import tqdm

from llama_mimi.evaluation.statistics import bootstrap_interval, seed_half_width, wilson_interval
from llama_mimi.report.results import NO_SAMPLE, SALMON, SALMON_MEAN, MeasureFormat, in_order, measure_of

COMPARABLE = ["measure", "conditions", "data", "data_kind"]
SYNTHETIC = ", synthetic"  # ending of a heading
ROUNDING = 1e-9  # seeds with smaller relative differences count as equal


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and its two intervals, in the units of a report. For perplexities, all are logarithms."""

    measure: MeasureFormat
    seeds: tuple[float, ...]  # mean of each seed
    interval: tuple[float, float] | None  # 95 % interval over items; None for fewer than two items
    count: int  # number of items; 0 for measures without items, such as bits/s

    @property
    def mean(self) -> float:
        return statistics.fmean(self.seeds)

    @property
    def is_significant(self) -> bool:
        """True for a difference if both intervals exclude zero and have a positive width."""
        half, mean = seed_half_width(self.seeds), abs(self.mean)
        if half is None or not ROUNDING * mean < half < mean:
            return False
        low, high = self.interval or (0.0, 0.0)
        return low < high and not low <= 0 <= high if self.interval else self.count == 0

    def text(self, *, is_difference: bool = False) -> str:
        """Return mean and intervals as text. A difference has a sign or is a ratio. A star marks significance."""
        is_log = self.measure.is_log
        sign = "+" if is_difference and not is_log else ""
        form = f"z.{self.measure.digits + (is_difference and is_log)}f"
        shown = np.exp if is_log else float
        text = f"{'ratio ' * (is_difference and is_log)}{shown(self.mean):{sign}{form}}"
        if self.interval:
            low, high = map(shown, self.interval)
            text += f" ({low:{sign}{form}} to {high:{sign}{form}})"
        if (half := seed_half_width(self.seeds)) is not None:
            text += f" ± {'a factor of ' * is_log}{shown(half):{form}}"
        return text + " *" * (is_difference and self.is_significant)


def estimate(values: pd.DataFrame, measure: MeasureFormat, *, is_wilson: bool = False) -> Estimate:
    """Return the mean of a table ``values`` that has rows (part, item) and a column for each seed.

    If ``is_wilson`` is True, compute Wilson's interval, as in `mean_of_parts`; otherwise, a bootstrap interval.
    """
    scaled = values * measure.factor
    seeds = tuple(map(float, scaled.groupby(level="part").mean().mean()))
    parts = [part.to_numpy() for _, part in scaled.mean(axis=1).groupby(level="part")]
    sizes = [len(part) for part in parts]
    if values.index[0][1] == "":
        return Estimate(measure, seeds, None, 0)
    interval = bootstrap_interval(*parts) if min(sizes) > 1 else None
    if is_wilson:
        count = len(sizes) ** 2 / sum(1 / size for size in sizes)
        low, high = wilson_interval(statistics.fmean(seeds) / measure.factor, count)
        interval = low * measure.factor, high * measure.factor
    return Estimate(measure, seeds, interval, sum(sizes))


def same_items(rows: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """Return a table of values with rows (part, item) and columns (system), and the number of excluded samples.

    A sample is excluded if a system lacks a value for it. Systems without any value are ignored. A reference has one
    sample for each item; this sample is compared with each sample of a model.
    """
    systems = list(rows.dropna(subset="value")["system"].unique())
    if not systems:
        return pd.DataFrame(), 0
    keys, is_single = ["part", "item", "sample"], rows["sample"] == NO_SAMPLE
    if not is_single.all():
        samples = rows.loc[~is_single, keys].drop_duplicates()
        rows = pd.concat([rows[~is_single], rows[is_single].drop(columns="sample").merge(samples)])
    kept = rows.pivot_table("value", keys, "system", sort=False)[systems].dropna()
    return kept.groupby(level=["part", "item"], sort=False).mean(), len(rows[keys].drop_duplicates()) - len(kept)


def by_measure(items: pd.DataFrame, keys: list[str]) -> Iterator[tuple[str, MeasureFormat, pd.DataFrame]]:
    """Yield heading, format and rows for each measure and combination of keys, and for the mean of SALMon's parts.

    A heading marks synthetic data. If a measure has several conditions or data sets, the heading names them.
    """
    items = items.assign(part=items["measure"])
    salmon = items[items["measure"].isin(SALMON)]
    is_whole = salmon.groupby(["system", "conditions", "data"])["measure"].transform("nunique") == len(SALMON)
    items = pd.concat([items, salmon[is_whole].assign(measure=SALMON_MEAN)])
    for name in tqdm(in_order(items["measure"]), "intervals", unit="measure", delay=2, leave=False):
        of_measure = items[items["measure"] == name]
        for _, rows in of_measure.groupby(keys, sort=False):
            heading = measure_of(name).heading
            for key in ("conditions", "data"):
                if key in keys and of_measure[key].nunique() > 1:
                    heading += f", {rows[key].iloc[0]}" if key == "conditions" else f", data {rows[key].iloc[0][:8]}"
            yield heading + SYNTHETIC * bool(rows["data_kind"].iloc[0] == "synthetic"), measure_of(name), rows
