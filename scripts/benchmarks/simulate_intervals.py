"""Error rates and coverage of the intervals of a study, on simulated decisions with a known difference.

    uv run python scripts/benchmarks/simulate_intervals.py

Decisions follow a logistic mixed model: the logit of a correct decision is the sum of normal effects of the item, the
item within a variant, the run and, with speakers, the speaker and the speaker within a variant.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize
from scipy.special import expit

from llama_mimi.common.command_line import run_command
from llama_mimi.evaluation.statistics import (
    Interval,
    RunVariance,
    crossed_interval,
    pooled_run_variance,
    wilson_interval,
)

NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(101)  # integrals over a normal distribution
SPEAKER_SD = 0.7  # standard deviation of both speaker effects, in logits


class Setting(NamedTuple):
    """A simulated study. Standard deviations of items are in logits."""

    runs: int = 3
    items: int = 200
    seed_sds: tuple[float, ...] = (0.02,)  # standard deviation of a run's accuracy over all items, for each variant
    accuracies: tuple[float, ...] = (0.65, 0.65)  # of each variant
    item_sd: float = 1.0
    variant_item_sd: float = 0.7
    parts: int = 1
    speakers: tuple[int, ...] = ()  # number of items of each speaker


# As in config/studies/tiny: the runs of a variant often disagree on sWUGGY, and seldom on SALMon.
SWUGGY, SALMON = Setting(accuracies=(0.55,) * 7), Setting(accuracies=(0.8,) * 7, item_sd=4.0, variant_item_sd=1.5)
NULL = [
    kind._replace(runs=runs, items=items, seed_sds=(seed_sd,))
    for kind in (SWUGGY, SALMON)
    for seed_sd in (0.02, 0.04)
    for items in (100, 200)
    for runs in (3, 5, 8)
]
DIFFERENT = Setting(accuracies=(0.725, 0.65))
PARTS = DIFFERENT._replace(parts=8)
SPEAKERS = DIFFERENT._replace(items=96, speakers=(12,) * 8)
UNEVEN = DIFFERENT._replace(items=96, speakers=(44, 22, 10, 6, 6, 4, 2, 2))
COVERAGE = [
    *[(f"difference, {S} seeds", DIFFERENT._replace(runs=S), "own") for S in (3, 5, 8)],
    *[(f"mean, {S} seeds", DIFFERENT._replace(runs=S), "mean") for S in (3, 5, 8)],
    ("difference, 8 parts of 25 pairs", PARTS, "own"),
    ("mean, 8 parts of 25 pairs", PARTS, "mean"),
    ("difference, 8 speakers with 12 prompts", SPEAKERS, "own"),
    ("mean, 8 speakers with 12 prompts", SPEAKERS, "mean"),
    ("difference, 8 speakers, but over prompts", SPEAKERS, "no speakers"),
    ("difference, 8 speakers with 2 to 44 prompts", UNEVEN, "own"),
    ("mean of one run, equal seeds", DIFFERENT._replace(runs=1, seed_sds=(0.0,)), "mean"),
    ("mean of one run, seed SD of 4 points", DIFFERENT._replace(runs=1, seed_sds=(0.04,)), "mean"),
    ("Wilson, one run, equal seeds", DIFFERENT._replace(runs=1, seed_sds=(0.0,)), "Wilson"),
    ("Wilson, one run, seed SD of 4 points", DIFFERENT._replace(runs=1, seed_sds=(0.04,)), "Wilson"),
]
UNEQUAL = SWUGGY._replace(seed_sds=(0.06, *[0.02] * 6))  # the first variant is less stable


@functools.cache
def _offset(accuracy: float, sd: float) -> float:
    """Return the mean logit of decisions with the given accuracy and standard deviation of logits."""
    return float(optimize.brentq(lambda mean: WEIGHTS @ expit(mean + sd * NODES) / WEIGHTS.sum() - accuracy, -40, 40))


@functools.cache
def _effects(setting: Setting) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean logit of each variant and part, and the standard deviation of each variant's run effects."""
    fixed = math.hypot(setting.item_sd, setting.variant_item_sd, *[SPEAKER_SD] * (2 * bool(setting.speakers)))
    # The accuracies of the parts of a benchmark differ, but their mean is the variant's accuracy.
    shifts_P = np.linspace(-0.15, 0.15, setting.parts) if setting.parts > 1 else np.zeros(1)
    p = expit(_offset(setting.accuracies[0], fixed) + fixed * NODES)
    points_per_logit = float(WEIGHTS @ (p * (1 - p)) / WEIGHTS.sum())
    run_sds_V = np.broadcast_to(setting.seed_sds, len(setting.accuracies)) / points_per_logit
    pairs = zip(setting.accuracies, np.hypot(fixed, run_sds_V), strict=True)
    return np.array([[_offset(accuracy + shift, sd) for shift in shifts_P] for accuracy, sd in pairs]), run_sds_V


def _labels(setting: Setting) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the part and the speaker of each item."""
    speaker_N = np.repeat(np.arange(len(setting.speakers)), setting.speakers) if setting.speakers else None
    return np.arange(setting.items) % setting.parts, speaker_N


def studies(setting: Setting, number: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Yield the decisions (0 or 1) of simulated studies, of shape (variants, runs, items)."""
    random = np.random.default_rng(seed)
    V, S, N = len(setting.accuracies), setting.runs, setting.items
    offsets_VP, run_sds_V = _effects(setting)
    part_N, speaker_N = _labels(setting)
    for _ in range(number):
        logits_VSN = offsets_VP[:, None, part_N] + random.normal(0, 1, (V, S, 1)) * run_sds_V[:, None, None]
        logits_VSN += random.normal(0, setting.item_sd, N) + random.normal(0, setting.variant_item_sd, (V, 1, N))
        if speaker_N is not None:
            of_speakers = random.normal(0, SPEAKER_SD, (V + 1, 1, len(setting.speakers)))
            logits_VSN += (of_speakers[1:] + of_speakers[0])[:, :, speaker_N]
        yield (random.random((V, S, N)) < expit(logits_VSN)).astype(float)


def _wilson(values_SN: np.ndarray) -> Interval:
    accuracy = float(values_SN[0].mean())
    return Interval(accuracy, *wilson_interval(accuracy, values_SN.shape[1]), math.nan)


def methods(setting: Setting) -> dict[str, Callable[[np.ndarray], Interval]]:
    """Return functions from values VSN to the interval of the first two variants' difference, or of the first mean."""
    part_N, speaker_N = _labels(setting)

    def whole(*values_SN: np.ndarray, run_variance: RunVariance | None = None) -> Interval:
        return crossed_interval(*values_SN, strata_N=part_N, clusters_N=speaker_N, run_variance=run_variance)

    return {
        "own": lambda y: whole(y[0], y[1]),
        "pooled": lambda y: whole(y[0], y[1], run_variance=pooled_run_variance(y.mean(axis=2))),
        "items": lambda y: whole(y[0].mean(0, keepdims=True), y[1].mean(0, keepdims=True)),
        "runs": lambda y: crossed_interval(y[0].mean(1, keepdims=True), y[1].mean(1, keepdims=True)),
        "no speakers": lambda y: crossed_interval(y[0], y[1]),
        "mean": lambda y: whole(y[0]),
        "Wilson": lambda y: _wilson(y[0]),
    }


def coverage(setting: Setting, names: Sequence[str], number: int, seed: int = 0) -> list[float]:
    """Return the fraction of simulated studies in which the interval of each method contains the true value."""
    functions, found = methods(setting), dict.fromkeys(names, 0)
    for values_VSN in studies(setting, number, seed):
        for name in names:
            interval = functions[name](values_VSN)
            true = setting.accuracies[0] - (0 if name in ("mean", "Wilson") else setting.accuracies[1])
            found[name] += not (interval.low > true or interval.high < true)  # NaN rejects nothing
    return [found[name] / number for name in names]


def main(simulations: int = 2000, seed: int = 0) -> None:
    """Print how often tests reject a true difference of zero, and how often intervals contain the true value.

    Args:
        simulations: number of simulated studies for each setting
        seed: seed of the random numbers
    """
    names = ["own", "pooled", "items", "runs"]
    print(f"True difference zero: rejections at 5 %, in percent, of {simulations:,} simulated studies with 7 variants")
    print(f"| accuracy | seed SD | pairs | seeds | {' | '.join(names)} |\n{'|---' * (4 + len(names))}|")
    for setting in [*NULL, UNEQUAL]:
        rates = [f"{100 * (1 - covered):.1f}" for covered in coverage(setting, names, simulations, seed)]
        sds = " and ".join(f"{100 * sd:g}" for sd in dict.fromkeys(setting.seed_sds))
        start = f"{100 * setting.accuracies[0]:g} | {sds} | {setting.items} | {setting.runs}"
        print(f"| {start} | {' | '.join(rates)} |", flush=True)
    print("\n| interval | coverage, in percent |\n|---|---|")
    for label, setting, name in COVERAGE:
        print(f"| {label} | {100 * coverage(setting, [name], simulations, seed)[0]:.1f} |", flush=True)


if __name__ == "__main__":
    run_command(main, __doc__)
