"""Means of systems on the same pairs or prompts, with their uncertainty."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from llama_mimi.evaluation.statistics import bootstrap_interval, seed_half_width, wilson_interval
from llama_mimi.report.results import NO_SAMPLE, SALMON, SALMON_MEAN, Measure, in_order, measure_of

COMPARABLE = ["measure", "conditions", "data", "data_kind"]
SYNTHETIC = ", synthetic"  # in headings
ROUNDING = 1e-9  # seeds whose relative difference is smaller are equal


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with two kinds of uncertainty, on the scale of differences: percent, or log perplexity."""

    measure: Measure
    seeds: tuple[float, ...]  # mean of each seed
    interval: tuple[float, float] | None  # 95 % interval over items; None for fewer than two
    count: int  # of items; 0 for a measure that has none, such as bits/s

    @property
    def mean(self) -> float:
        return statistics.fmean(self.seeds)

    @property
    def is_significant(self) -> bool:
        """True for a difference whose intervals over items and over seeds exclude zero and have a width."""
        half, mean = seed_half_width(self.seeds), abs(self.mean)
        if half is None or not ROUNDING * mean < half < mean:
            return False
        low, high = self.interval or (0.0, 0.0)
        return low < high and not low <= 0 <= high if self.interval else self.count == 0

    def text(self, *, is_difference: bool = False) -> str:
        """Return the mean with both intervals; a difference has a sign or is a ratio, with a star if significant."""
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


def estimate(values: pd.DataFrame, measure: Measure, *, is_wilson: bool = False) -> Estimate:
    """Return the mean of the means of parts, over seeds.

    ``values`` are by part and item (rows) and seed (columns), as `same_items` returns them. With ``is_wilson`` the
    interval is Wilson's of a proportion; a mean of k parts has k^2 / sum(1 / n_i) values.
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
    """Return values by part and item (rows) and system (columns), and how many samples were left out.

    A sample counts where every system has a value. The only sample of a reference stands beside all samples of an item.
    Systems without any value take no part.
    """
    systems = list(rows.dropna(subset="value")["system"].unique())
    if not systems:
        return pd.DataFrame(), 0
    wide = rows.pivot_table("value", ["part", "item", "sample"], "system", sort=False)[systems]
    own = wide[wide.index.get_level_values("sample") != NO_SAMPLE]
    if own.empty:
        own = wide
    elif len(own) < len(wide):
        single = wide.xs(NO_SAMPLE, level="sample").reindex(own.index.droplevel("sample")).set_axis(own.index)
        own = own.fillna(single.loc[:, own.isna().all()])
    kept = own.dropna()
    is_single = rows["sample"] == NO_SAMPLE
    samples = rows.loc[~is_single | is_single.all(), ["part", "item", "sample"]].drop_duplicates()
    return kept.groupby(level=["part", "item"], sort=False).mean(), len(samples) - len(kept)


def by_measure(items: pd.DataFrame, keys: list[str]) -> Iterator[tuple[str, Measure, pd.DataFrame]]:
    """Yield heading, measure and rows of each combination of keys; `part` of a row is its measure, or part of SALMon.

    The heading marks synthetic data, and names conditions and data where the measure has several.
    """
    items = items.assign(part=items["measure"])
    salmon = items[items["measure"].isin(SALMON)]
    is_whole = salmon.groupby(["system", "conditions", "data"])["measure"].transform("nunique") == len(SALMON)
    items = pd.concat([items, salmon[is_whole].assign(measure=SALMON_MEAN)])
    for name in in_order(items["measure"]):
        of_measure = items[items["measure"] == name]
        for _, rows in of_measure.groupby(keys, sort=False):
            heading = measure_of(name).heading
            for key in ("conditions", "data"):
                if key in keys and of_measure[key].nunique() > 1:
                    heading += f", {rows[key].iloc[0]}" if key == "conditions" else f", data {rows[key].iloc[0][:8]}"
            yield heading + SYNTHETIC * bool(rows["data_kind"].iloc[0] == "synthetic"), measure_of(name), rows
