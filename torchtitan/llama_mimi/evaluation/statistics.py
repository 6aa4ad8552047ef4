"""Two-sided 95 % confidence intervals, and two-sided tests."""

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

RESAMPLES = 10_000


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


def bootstrap_interval(*parts: Sequence[float]) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean over parts. Each part is resampled separately.

    Most measures have one part, but the SALMon mean has eight parts. The same values always give the same interval.
    A part needs at least two values. Method: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, sec. 13.3.
    """
    if not parts or min(map(len, parts)) < 2:
        raise ValueError("a bootstrap interval needs at least two values for each part; add values")
    found = stats.bootstrap(
        [np.asarray(part, dtype=np.float64) for part in parts],
        lambda *some, axis: np.mean([part.mean(axis=axis) for part in some], axis=0),
        n_resamples=RESAMPLES,
        batch=max(1, 4_000_000 // max(map(len, parts))),
        method="percentile",
        rng=0,
    ).confidence_interval
    return float(found.low), float(found.high)


def seed_half_width(values_S: Sequence[float]) -> float | None:
    """Return half the width of the 95 % interval of a mean over seeds (Student's t); None for fewer than two seeds."""
    if len(values_S) < 2:
        return None
    return float(stats.t.ppf(0.975, len(values_S) - 1) * stats.sem(values_S))


def sign_test(num_better: int, num_worse: int) -> float:
    """Return the p-value of the exact sign test. For paired results, this test is McNemar's exact test (1947)."""
    return float(stats.binomtest(num_better, num_better + num_worse).pvalue) if num_better + num_worse else 1.0
