"""Intervals, p-values and power: agreement with scipy and with plain loops, and simulated error rates."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from simulate_intervals import NULL, coverage

from llama_mimi.common.errors import UserError
from llama_mimi.evaluation.statistics import (
    Components,
    RunVariance,
    crossed_interval,
    detectable_difference,
    planned_error,
    pooled_run_variance,
    power,
    variance_components,
    wilson_interval,
)
from llama_mimi.report.power import power_table
from llama_mimi.report.results import COLUMNS
from llama_mimi.study.config import read_study
from llama_mimi.study.report import power_report


def test_wilson_interval():
    # computed with statsmodels.stats.proportion.proportion_confint(method="wilson")
    known = {(0.5, 200): (0.4313608, 0.5686392), (1.0, 200): (0.9811546, 1.0), (0.0, 10): (0.0, 0.2775328)}
    for (accuracy, count), expected in known.items():
        low, high = wilson_interval(accuracy, count)
        assert 0 <= low <= accuracy <= high <= 1 and (low, high) == pytest.approx(expected, abs=1e-6)


def test_no_values_have_no_interval():
    with pytest.raises(ValueError, match="needs at least one value, not 0"):
        wilson_interval(0.5, 0)


def test_pooled_run_variance_follows_levene():
    alike, unlike = [[1.0, 2.0, 4.0], [5.0], [7.0, 6.0, 9.0, 8.0]], [[0.0, 0.1, 0.2, 0.1] * 3, [0.0, 50.0, 90.0] * 4]
    assert stats.levene(alike[0], alike[2], center="median").pvalue > 0.05
    pooled = (2 * np.var(alike[0], ddof=1) + 3 * np.var(alike[2], ddof=1)) / 5
    assert pooled_run_variance(alike) == (pytest.approx(pooled), 5)
    assert stats.levene(*unlike, center="median").pvalue < 0.05 and pooled_run_variance(unlike) is None
    assert pooled_run_variance([[1.0], [2.0]]) is None and pooled_run_variance([[1.0], [2.0, 4.0]]) == (2, 1)
    assert pooled_run_variance([[1.0, 1.0], [2.0, 2.0]]) == (0, 2)


def t_test(found):
    """Return an interval and its p-value from a result of scipy."""
    return (*found.confidence_interval(), found.pvalue)


@pytest.mark.parametrize("is_pooled", [False, True])
def test_one_item_is_a_t_test_over_runs(is_pooled):
    first, baseline = np.array([0.3, 0.9, 1.1]), np.array([0.2, 0.1, 0.4, 0.35])
    pooled = pooled_run_variance([first, baseline]) if is_pooled else None
    found = crossed_interval(first[:, None], baseline[:, None], run_variance=pooled)
    assert found[1:] == pytest.approx(t_test(stats.ttest_ind(first, baseline, equal_var=is_pooled)))
    assert found.mean == pytest.approx(first.mean() - baseline.mean())
    assert crossed_interval(first[:, None])[1:] == pytest.approx(t_test(stats.ttest_1samp(first, 0)))


def test_equal_runs_are_a_paired_t_test_over_items_and_one_run_has_no_p_value():
    first, baseline = np.random.default_rng(0).normal(size=(2, 40))
    expected = t_test(stats.ttest_rel(first, baseline))
    assert crossed_interval([first] * 3, [baseline] * 2)[1:] == pytest.approx(expected)
    one = crossed_interval([first], [baseline])
    assert one[1:3] == pytest.approx(expected[:2]) and math.isnan(one.p_value)
    # The variance between other variants' runs makes one run comparable, and the interval wider.
    pooled = crossed_interval([first], [baseline], run_variance=RunVariance(0.01, 14))
    assert pooled.p_value > expected[2] and pooled.low < expected[0]


def test_values_that_are_all_equal_have_no_interval():
    for values in ([[0.7]], [[0.7], [0.7], [0.7]], np.full((3, 9), 0.7)):
        found = crossed_interval(values)
        assert found.mean == pytest.approx(0.7) and np.isnan(found[1:]).all()
    assert np.isnan(crossed_interval(np.eye(3), clusters_N=["a"] * 3)[1:]).all()  # one speaker
    assert np.isnan(crossed_interval(np.eye(3), strata_N=[0, 0, 1])[1:]).all()  # a part with one item


def moment(names, power):
    """Return the chance that ``power`` items, drawn with replacement, are of one cluster."""
    return sum((names.count(name) / len(names)) ** power for name in set(names))


def plain_variances(first, baseline, strata, clusters):
    """Return the mean, A of each variant, B and C of `crossed_interval`, computed by loops."""

    def weight(n):
        return 1 / (len(set(strata)) * strata.count(strata[n]))

    def over_items(values):
        total = 0.0
        for part in set(strata):
            inside = [n for n in range(len(values)) if strata[n] == part]
            mean = sum(values[n] for n in inside) / len(inside)
            names = {clusters[n] for n in inside}
            sums = [sum(weight(n) * (values[n] - mean) for n in inside if clusters[n] == name) for name in names]
            s2, s3 = (moment([clusters[n] for n in inside], power) for power in (2, 3))
            total += s2 / (s2 - 2 * s3 + s2**2) * sum(s**2 for s in sums)
        return total

    items = range(len(strata))
    means = [[sum(run[n] for run in runs) / len(runs) for n in items] for runs in (first, baseline)]
    difference = [a - b for a, b in zip(*means, strict=True)]
    of_runs, of_residuals = [], 0.0
    for runs, item_means in zip((first, baseline), means, strict=True):
        run_means = [sum(weight(n) * run[n] for n in items) for run in runs]
        of_runs.append(np.var(run_means, ddof=1) / len(runs))
        residuals = [over_items([run[n] - item_means[n] for n in items]) for run in runs]
        of_residuals += sum(residuals) / (len(runs) - 1) / len(runs)
    estimate = sum(weight(n) * difference[n] for n in items)
    return estimate, of_runs, over_items(difference), of_residuals


@given(st.integers(0, 2**32 - 1), st.integers(2, 4), st.integers(2, 4), st.integers(1, 3), st.floats(0, 2))
def test_crossed_interval_equals_plain_loops(seed, num_first, num_baseline, num_strata, run_sd):
    random = np.random.default_rng(seed)
    strata, clusters = [], []
    for part in range(num_strata):  # at least two clusters in each part
        chosen = [0, 1, *random.integers(0, 4, random.integers(0, 8))]
        clusters += [f"speaker {c}" for c in chosen]
        strata += [part] * len(chosen)
    order = random.permutation(len(strata))
    strata, clusters = [strata[i] for i in order], [clusters[i] for i in order]
    first, baseline = (
        random.normal(size=(S, len(strata))) + run_sd * random.normal(size=(S, 1)) for S in (num_first, num_baseline)
    )
    mean, runs, items, residual = plain_variances(first, baseline, strata, clusters)
    of_parts = [[c for c, s in zip(clusters, strata, strict=True) if s == part] for part in range(num_strata)]
    df_items = sum(max(1 / moment(part, 2) - 1, 1) for part in of_parts)
    over_items = max(items - residual, 0)
    variance = sum(runs) + over_items
    pooled = RunVariance(sum(runs) / (1 / num_first + 1 / num_baseline), 7)
    for run_variance in (None, pooled):
        terms = [(sum(runs), 7)] if run_variance else [(runs[0], num_first - 1), (runs[1], num_baseline - 1)]
        df = variance**2 / (sum(term**2 / df for term, df in terms) + over_items**2 / df_items)
        half = stats.t.ppf(0.975, df) * math.sqrt(variance)
        found = crossed_interval(first, baseline, strata_N=strata, clusters_N=clusters, run_variance=run_variance)
        assert found[:3] == pytest.approx((mean, mean - half, mean + half), abs=1e-9)
        assert found.p_value == pytest.approx(2 * stats.t.sf(abs(mean) / math.sqrt(variance), df))


def contrasts(components, difference, num_runs, num_items, number):
    """Yield values of two variants; all effects have normal distributions."""
    random = np.random.default_rng(0)
    run_sd, item_sd, residual_sd = np.sqrt(components)
    for _ in range(number):
        baseline_N = random.normal(size=num_items)
        first_N = baseline_N + difference + item_sd * random.normal(size=num_items)
        runs_VSN = run_sd * random.normal(size=(2, num_runs, 1))
        runs_VSN = runs_VSN + residual_sd * random.normal(size=(2, num_runs, num_items))
        yield first_N + runs_VSN[0], baseline_N + runs_VSN[1]


def test_components_and_power_of_simulated_contrasts():
    components, difference, S, N = Components(0.04, 1.0, 1.5), 0.8, 4, 30
    pairs = contrasts(components, difference, S, N, 1000)
    found = [(variance_components(*pair)[0], crossed_interval(*pair).p_value) for pair in pairs]
    estimates, p_values = (np.array(column) for column in zip(*found, strict=True))
    assert estimates.mean(axis=0) == pytest.approx(components, rel=0.1)
    error, df = planned_error(components, S, N)
    expected = power(difference / error, df)
    assert 0.5 < expected < 0.9 and np.mean(p_values < 0.05) == pytest.approx(expected, abs=0.04)
    error, df = planned_error(components, S, N, num_variants=7)
    assert power(detectable_difference(components, S, N, num_variants=7) / error, df) == pytest.approx(0.8)
    assert power(0.0, df) == pytest.approx(0.05)


def test_power_without_items_is_that_of_a_t_test():
    # statsmodels.stats.power.TTestIndPower().power(effect_size=0.5, nobs1=64, alpha=0.05)
    error, df = planned_error(Components(1.0, 0.0, 0.0), 64, 1)
    assert power(0.5 / error, df) == pytest.approx(0.8014596, abs=1e-6)


def test_power_table_shows_components_in_percent_and_skips_measures_without_variance(tmp_path):
    random = np.random.default_rng(0)
    values = random.integers(0, 2, (2, 3, 40)).astype(float)
    systems = [[f"{variant}-seed{seed}" for seed in range(3)] for variant in "ab"]
    same = dict.fromkeys(COLUMNS, "") | {"sample": 0, "is_reference": False}
    rows = [
        same
        | {
            "system": system,
            "measure": "sLM21/lexical_dev",
            "item": str(n),
            "cluster": str(int(n**0.5)),
            "value": value,
        }
        for of_variant, values_SN in zip(systems, values, strict=True)
        for system, values_N in zip(of_variant, values_SN, strict=True)
        for n, value in enumerate(values_N)
    ]
    rows += [row | {"measure": "seconds", "value": 2.0} for row in rows]
    bits = [same | {"system": name, "measure": "bits/4", "cluster": "", "value": 1.0} for name in systems[0]]
    bits += [
        row | {"system": name, "value": value} for row, name, value in zip(bits, systems[1], (1, 2, 4), strict=True)
    ]
    of_bits, row = power_table(pd.DataFrame(rows + bits), [systems, systems], "title").tables[0].rows
    limits = [detectable_difference(Components(7 / 6, 0, 0), runs, 1) for runs in (3, 5, 8, 16)]  # variances 0 and 7/3
    shown = ", ".join(f"{limit:.1f}" for limit in limits)
    assert of_bits == ["validation bits/s, Q = 4", "1.1", "", "", shown, "", "", ""]
    components, num_speakers = variance_components(*values, clusters_N=[int(n**0.5) for n in range(40)])
    assert num_speakers == pytest.approx(40**2 / sum(size**2 for size in (1, 3, 5, 7, 9, 11, 4)))
    components = Components(*np.maximum(components, 0))
    assert row[:4] == ["sWUGGY (n = 40)", *(f"{100 * np.sqrt(variance):.1f}" for variance in components)]
    for cell, items in zip(row[4:], (40, 200, 1000, 5000), strict=True):
        limits = [detectable_difference(components, runs, items * num_speakers / 40) for runs in (3, 5, 8, 16)]
        assert cell == ", ".join(f"{100 * limit:.1f}" for limit in limits)
    with pytest.raises(UserError, match="does not contain results; run the study first"):
        power_report(SimpleNamespace(output_dir=tmp_path))
    with pytest.raises(UserError, match="no table has two variants with at least two"):
        power_table(pd.DataFrame(rows), [[[systems[0][0]], [systems[1][0]]]], "title")


@pytest.mark.slow
def test_the_page_on_studies_shows_the_power_of_the_committed_study():
    study = replace(read_study(ROOT / "config/studies/tiny.toml"), output_dir=ROOT / "config/studies/tiny")
    page = (ROOT / "config/studies/README.md").read_text().split("## Power")[1].split("\n## ")[0]
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert len(rows) == 7 and set(rows) <= set(power_report(study).splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("setting", NULL, ids=str)
def test_simulated_null_rate(setting):
    """A test rejects a true difference of zero in 3 to 7 % of the studies, with own and with pooled variances."""
    assert all(0.93 <= covered <= 0.97 for covered in coverage(setting, ["own", "pooled"], 2000))
