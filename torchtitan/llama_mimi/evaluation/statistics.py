"""Two-sided 95 % confidence intervals, and two-sided tests."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, stats

ROUNDING = 1e-9  # values with smaller relative differences count as equal


class Interval(NamedTuple):
    """A mean or a difference, its 95 % confidence interval, and the p-value of the two-sided test of zero.

    Limits and p-value are NaN if they cannot be computed, for example if all values are equal.
    """

    mean: float
    low: float
    high: float
    p_value: float


class RunVariance(NamedTuple):
    """Variance of the means of runs that differ only in their seed, and its degrees of freedom."""

    variance: float
    df: int


def wilson_interval(accuracy: float, count: float) -> tuple[float, float]:
    """Return the confidence interval of a proportion (Wilson 1927, without continuity correction).

    `scipy.stats.binomtest` accepts only whole numbers of successes, but ties and groups of pairs give fractions.
    """
    if not count > 0:
        raise ValueError(f"an interval of a proportion needs at least one value, not {count}; add values")
    z = float(stats.norm.ppf(0.975))
    center = accuracy + z**2 / (2 * count)
    half = z * math.sqrt(accuracy * (1 - accuracy) / count + z**2 / (4 * count**2))
    scale = 1 + z**2 / count
    # The interval must include the accuracy, even after rounding at 0 and 1.
    return max(0.0, min(accuracy, (center - half) / scale)), min(1.0, max(accuracy, (center + half) / scale))


def pooled_run_variance(runs_of_variants: Sequence[Sequence[float]]) -> RunVariance | None:
    """Return the variance of the means of a variant's runs, pooled over variants.

    The result is None if Levene's test around the median (Brown and Forsythe 1974) rejects equal variances at 5 %, or
    if no variant has two runs. With three runs for each variant, the test seldom rejects.

    Args:
        runs_of_variants: means of the runs of each variant; variants with one run are ignored. Variants with two runs
            are pooled without a test, because both runs have the same distance from their median.
    """
    variants = [np.asarray(means_S, dtype=np.float64) for means_S in runs_of_variants if len(means_S) > 1]
    tested = [means_S for means_S in variants if len(means_S) > 2]
    is_spread = any(np.ptp(means_S) > 0 for means_S in tested)  # otherwise, Levene's test divides by zero
    if not variants or (len(tested) > 1 and is_spread and stats.levene(*tested, center="median").pvalue < 0.05):
        return None
    df = sum(len(means_S) - 1 for means_S in variants)
    return RunVariance(float(sum(len(means_S) * means_S.var() for means_S in variants)) / df, df)


def crossed_interval(
    first_SN: ArrayLike,
    baseline_SN: ArrayLike | None = None,
    *,
    strata_N: ArrayLike | None = None,
    clusters_N: ArrayLike | None = None,
    run_variance: RunVariance | None = None,
) -> Interval:
    """Return the mean of a variant, or its difference from a baseline, with uncertainty over runs and items together.

    Runs and items are crossed random effects, like readers and cases in studies of diagnostic imaging (Dorfman, Berbaum
    and Metz 1992; Obuchowski and Rockette 1995). The variance is A + max(B - C, 0), as in Hillis (2007): A is the
    variance over runs, B is the variance over items, and C is the residual variance, which A and B both contain. The
    degrees of freedom are computed from both terms of this sum (Satterthwaite 1946); Hillis computes them from A alone.
    scripts/benchmarks/MEASURED.md contains the error rates of the test in simulations.

    The runs of two variants count as independent. Runs with the same seed read the same data in the same order; if
    this makes their results similar, the interval of a difference is too wide.

    A needs at least two runs of each variant. If a variant has one run and ``run_variance`` is missing, the interval
    includes only the variation between items, and the p-value is NaN.

    Args:
        first_SN: values of each run and item; a single item stands for a measure without items, such as bits/s.
        baseline_SN: values of the baseline, with other runs and the same items.
        strata_N: part of each item; all parts have equal weight. Default: one part.
        clusters_N: cluster of each item, such as its speaker; items of one cluster and part may depend on each other.
            Default: each item is a cluster.
        run_variance: pooled variance of the run means of a variant. Default: each variant has its own variance.
    """
    variants = [np.asarray(values, dtype=np.float64) for values in (first_SN, baseline_SN) if values is not None]
    found = _variances(variants, strata_N, clusters_N)
    runs = [(variance, len(values_SN) - 1) for variance, values_SN in zip(found.runs, variants, strict=True)]
    if run_variance:
        runs = [(run_variance.variance * sum(1 / len(values_SN) for values_SN in variants), run_variance.df)]
    is_over_runs = all(df > 0 for _, df in runs)
    of_items = float(np.maximum(found.items - found.residual * is_over_runs, 0))  # NaN if B is NaN
    terms = [*runs * is_over_runs, (of_items, found.items_df)]  # variances and their degrees of freedom
    variance = sum(term for term, _ in terms)
    if not variance > (ROUNDING * max(np.abs(values_SN).max() for values_SN in variants)) ** 2:
        return Interval(found.mean, math.nan, math.nan, math.nan)
    df = variance**2 / sum(term**2 / df for term, df in terms if term > 0)
    error = math.sqrt(variance)
    half = float(stats.t.ppf(0.975, df)) * error
    p_value = 2 * float(stats.t.sf(abs(found.mean) / error, df)) if is_over_runs else math.nan
    return Interval(found.mean, found.mean - half, found.mean + half, p_value)


class Components(NamedTuple):
    """Components of the variance of a difference between two variants."""

    run: float  # variance between the runs of a variant, without the residual variance
    item: float  # variance, between items, of the difference between the variants
    residual: float  # residual variance of one value (one run, one item)


def variance_components(
    first_SN: ArrayLike,
    baseline_SN: ArrayLike,
    *,
    strata_N: ArrayLike | None = None,
    clusters_N: ArrayLike | None = None,
) -> tuple[Components, float]:
    """Return estimates of the components, and the effective number of clusters (without clusters: of items).

    An estimate of a small variance may be negative. With clusters, `item` and `residual` are variances of means over a
    cluster. Arguments are those of `crossed_interval`. Each variant needs two runs.
    """
    variants = [np.asarray(values_SN, dtype=np.float64) for values_SN in (first_SN, baseline_SN)]
    found = _variances(variants, strata_N, clusters_N)
    num_items = found.items_df + (1 if strata_N is None else len(np.unique(strata_N)))
    per_run = sum(1 / len(values_SN) for values_SN in variants)
    run = sum(found.runs) - found.residual
    of_items, residual = (found.items - found.residual) * num_items, found.residual * num_items / per_run
    return Components(run / per_run, of_items, residual), num_items


def detectable_difference(components: Components, num_runs: int, num_items: float, num_variants: int = 2) -> float:
    """Return the true difference between two variants that has p <= 0.05 in `crossed_interval` with a power of 80 %.

    The test statistic has a noncentral t distribution, with the expected values of its variances, as in the planning of
    studies with readers and cases (Hillis, Obuchowski and Berbaum 2011).

    Args:
        num_runs: number of runs of each variant.
        num_items: number of items (or effective clusters) that both variants share; 1 for a measure without items.
        num_variants: number of variants over which the variance of runs is pooled.
    """
    error, df = planned_error(components, num_runs, num_items, num_variants)
    limit = float(optimize.brentq(lambda shift: power(shift, df) - 0.8, 0, 3 * stats.t.ppf(0.975, df)))
    return limit * error


def planned_error(
    components: Components, num_runs: int, num_items: float, num_variants: int = 2
) -> tuple[float, float]:
    """Return the standard error of a difference and its degrees of freedom; see `detectable_difference`."""
    of_runs = 2 * (components.run + components.residual / num_items) / num_runs
    of_items = components.item / num_items
    df_runs, df_items = num_variants * (num_runs - 1), max(1, num_items - 1)
    variance = of_runs + of_items
    return math.sqrt(variance), variance**2 / (of_runs**2 / df_runs + of_items**2 / df_items)


def power(shift: float, df: float) -> float:
    """Return the power of a two-sided t-test at 5 % for a true difference of ``shift`` standard errors."""
    limit = stats.t.ppf(0.975, df)
    return float(stats.nct.sf(limit, df, shift) + stats.nct.sf(limit, df, -shift))


class _Variances(NamedTuple):
    """Mean or difference over runs and items, and the variances that `crossed_interval` combines."""

    mean: float
    runs: list[float]  # A, for each variant; NaN for a variant with one run
    items: float  # B
    items_df: float
    residual: float  # C; variants with one run add nothing


def _variances(variants: Sequence[np.ndarray], strata_N: ArrayLike | None, clusters_N: ArrayLike | None) -> _Variances:
    """Return the mean of a variant, or the difference of two variants, with its variances. Shape of a variant: SN."""
    num_items = variants[0].shape[1]
    strata_N = np.zeros(num_items) if strata_N is None else np.asarray(strata_N)
    clusters_N = np.arange(num_items) if clusters_N is None else np.asarray(clusters_N)
    effects_N = np.subtract.reduce([values_SN.mean(axis=0) for values_SN in variants])
    (mean,), (items,), items_df = _over_items(effects_N[None], strata_N, clusters_N)
    runs, residual = [], 0.0
    for values_SN in variants:
        means_S, variances_S, _ = _over_items(values_SN - values_SN.mean(axis=0), strata_N, clusters_N)
        scale = len(values_SN) * (len(values_SN) - 1)
        runs.append(float((means_S**2).sum()) / scale if scale else math.nan)
        residual += float(variances_S.sum()) / scale if scale else 0.0
    return _Variances(float(mean), runs, float(items), items_df, residual)


def _over_items(
    values_SN: np.ndarray, strata_N: np.ndarray, clusters_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """Return each run's mean over items, the variance of this mean over clusters of items, and degrees of freedom.

    The variance of a part is a factor times the sum of the squared sums of a cluster's deviations (Liang and Zeger
    1986). For clusters with fractions p of the items and S_k = sum(p^k), the factor is S_2 / (S_2 - 2 S_3 + S_2^2): the
    variance is then unbiased if all items of a cluster have the same value. For G equal clusters, the factor is
    G / (G - 1). The degrees of freedom are those of 1 / S_2 clusters (Kish 1965), but at least 1. If all items of a
    part are in one cluster, the variance is NaN.
    """
    means_S, variances_S, df = np.zeros(len(values_SN)), np.zeros(len(values_SN)), 0.0
    strata = np.unique(strata_N)
    for stratum in strata:
        part_SN = values_SN[:, strata_N == stratum]
        part_SN = part_SN / (part_SN.shape[1] * len(strata))
        means_S += part_SN.sum(axis=1)
        _, cluster_N = np.unique(clusters_N[strata_N == stratum], return_inverse=True)
        sizes_G = np.bincount(cluster_N)
        sums_GS = np.zeros((len(sizes_G), len(values_SN)))
        np.add.at(sums_GS, cluster_N, (part_SN - part_SN.mean(axis=1, keepdims=True)).T)
        s2, s3 = (float(((sizes_G / sizes_G.sum()) ** k).sum()) for k in (2, 3))
        variances_S += (sums_GS**2).sum(axis=0) * (s2 / (s2 - 2 * s3 + s2**2) if len(sizes_G) > 1 else np.nan)
        df += max(1 / s2 - 1, 1) if len(sizes_G) > 1 else 0
    return means_S, variances_S if len(strata_N) > 1 else np.zeros(len(values_SN)), df
