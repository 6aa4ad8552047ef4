"""Systems on the same samples: means, and bootstrap intervals over prompts."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 10_000
Samples = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class SameSamples:
    """What is left of systems once they are of the same samples.

    Args:
        means: by system and prompt.
        left_out: samples of each system that were left out, as another or itself has no value there.
        empty: systems that were measured and have no value at all; they take no part.
    """

    means: dict[str, dict[str, float]]
    left_out: dict[str, int]
    empty: list[str]


def on_same_samples(systems: Mapping[str, Samples], column: str) -> SameSamples:
    """The mean value of each prompt by system, over samples that have a value in all systems.

    Args:
        systems: samples with the keys prompt, sample (None where a system has one alone, which then stands beside all
            of another's) and the columns that were measured. Systems that were not measured so take no part.
    """
    measured = {name: samples for name, samples in systems.items() if any(column in sample for sample in samples)}
    heard = {n: s for n, s in measured.items() if any(sample.get(column) is not None for sample in s)}
    empty = {
        (sample["prompt"], sample["sample"])
        for samples in heard.values()
        for sample in samples
        if sample.get(column) is None
    }
    values: dict[str, dict[str, list[float]]] = {}
    for name, samples in heard.items():
        values[name] = defaultdict(list)
        for sample in samples:
            if not {(sample["prompt"], sample["sample"]), (sample["prompt"], None)} & empty:
                values[name][sample["prompt"]].append(sample[column])
    in_all = set.intersection(*(set(of_system) for of_system in values.values())) if values else set()
    kept = {name: {prompt: of[prompt] for prompt in of if prompt in in_all} for name, of in values.items()}
    return SameSamples(
        means={name: {prompt: float(np.mean(some)) for prompt, some in of.items()} for name, of in kept.items()},
        left_out={name: len(heard[name]) - sum(map(len, of.values())) for name, of in kept.items()},
        empty=[name for name in measured if name not in heard],
    )


def interval(values_P: Sequence[float]) -> tuple[float, float]:
    """95 % bootstrap interval (percentiles) of a mean over prompts (P,); the same values give the same interval.

    Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3.

    Raises:
        ValueError: there are no values.
    """
    return interval_of_parts([values_P])


def interval_of_parts(parts: Sequence[Sequence[float]]) -> tuple[float, float]:
    """As `interval`, of the mean of the means of several parts, each of which is drawn from by itself."""
    if not parts or not all(map(len, parts)):
        raise ValueError("the mean of no values has no interval; give at least one value for each part")
    random = np.random.default_rng(0)
    means_R = np.mean([_resampled_means(np.asarray(values_P, dtype=np.float64), random) for values_P in parts], axis=0)
    low, high = np.quantile(means_R, (0.025, 0.975))
    return float(low), float(high)


def paired_difference(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, Any]:
    """How much higher a mean is than b's on the same prompts, and its 95 % bootstrap interval.

    Raises:
        ValueError: the two are not of the same prompts, or there are none.
    """
    if a.keys() != b.keys():
        raise ValueError("the two systems were not measured on the same prompts")
    differences_P = [a[prompt] - b[prompt] for prompt in sorted(a)]
    return {
        "interval": interval(differences_P),
        "difference": float(np.mean(differences_P)),
        "count": len(differences_P),
    }


def _resampled_means(values_P: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Means (R,) of as many prompts drawn with replacement, in parts that fit into memory."""
    P = len(values_P)
    size = max(1, 4_000_000 // P)
    parts = [
        values_P[random.integers(P, size=(min(size, RESAMPLES - start), P))].mean(axis=1)
        for start in range(0, RESAMPLES, size)
    ]
    return np.concatenate(parts)
