"""Power of a study: the differences that more seeds or more items would detect."""

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd

from llama_mimi.common.errors import UserError
from llama_mimi.evaluation.statistics import Components, detectable_difference, variance_components
from llama_mimi.report.comparisons import NOT_COMPARED
from llama_mimi.report.document import Section, Table
from llama_mimi.report.estimates import COMPARABLE, by_measure, same_items

SEEDS = (3, 5, 8, 16)
ITEMS = (200, 1000, 5000)
LEGEND = (
    "Each cell contains the smallest true difference between two variants that is detected with a probability of 80 % "
    f"with {', '.join(map(str, SEEDS[:-1]))} and {SEEDS[-1]} seeds for each variant. Accuracies are in percentage "
    "points. Perplexities have ratios instead. `config/studies/README.md` explains the test and the columns."
)


def power_table(items: pd.DataFrame, tables: Sequence[Sequence[Sequence[str]]], title: str) -> Section:
    """Return a table of detectable differences for each measure, with the variance components of a finished study.

    The components are means over all pairs of variants that are in the same table of the study.

    Args:
        items: values of the study; see `read_results`.
        tables: the systems of each variant, for each table of the study; one system per seed.
    """
    rows = []
    for heading, measure, values in by_measure(items[~items["measure"].isin(NOT_COMPARED)], COMPARABLE):
        found, has_items = [], values["item"].iloc[0] != ""  # bits/s have no items
        for first, baseline in itertools.chain(*(itertools.combinations(variants, 2) for variants in tables)):
            shared, _ = same_items(values[values["system"].isin([*first, *baseline])])
            sides = [shared[shared.columns.intersection(systems)].to_numpy().T for systems in (first, baseline)]
            if min(map(len, sides)) > 1 and (len(shared) > 1 or not has_items):
                labels = shared.index.to_frame()
                clusters = labels["part"] + "/" + labels["cluster"]
                parts, num_clusters = variance_components(*sides, strata_N=labels["part"], clusters_N=clusters)
                found.append((*parts, len(shared), num_clusters))
        if not found:
            continue
        present = {*values["system"]}
        num_variants = len({tuple(some) for variants in tables for some in variants if len({*some} & present) > 1})
        *variances, num_items, num_clusters = np.mean(found, axis=0)
        components = Components(*np.maximum(variances, 0))
        if not sum(components) > 0:  # all values are equal, or all items have the same speaker
            continue
        sds = [f"{np.sqrt(variance) * measure.factor:.{measure.digits}f}" for variance in components]
        cells = []
        for number in (num_items, *ITEMS * has_items):
            clusters_of_number = max(2.0, number * num_clusters / num_items) if has_items else 1
            limits = [detectable_difference(components, S, clusters_of_number, num_variants) for S in SEEDS]
            cells.append(", ".join(measure.text(limit) for limit in limits))
        sds, cells = (sds, cells) if has_items else ([sds[0], "", ""], [*cells, *[""] * len(ITEMS)])
        rows.append([heading + f" (n = {num_items:,.0f})" * has_items, *sds, *cells])
    if not rows:
        raise UserError("no table has two variants with at least two finished runs each; add seeds to the study")
    header = ["measure", "SD: seeds", "items", "residual", "this n", *(f"n = {number:,}" for number in ITEMS)]
    return Section(title, [LEGEND], tables=[Table(header, rows)])
