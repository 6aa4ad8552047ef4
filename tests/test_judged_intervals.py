"""Means and intervals of judged systems, on the same samples."""

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from llama_mimi.judging.intervals import interval, interval_of_parts, on_same_samples, paired_difference
from llama_mimi.judging.table import differences, means, table


def rows(values, column="similarity"):
    """Samples of a system: a list of values a prompt; a single number is one that has no number of its own."""
    return [
        {"prompt": prompt, "sample": None if not isinstance(of_prompt, list) else number, column: value}
        for prompt, of_prompt in values.items()
        for number, value in enumerate(of_prompt if isinstance(of_prompt, list) else [of_prompt])
    ]


def test_an_interval_is_scipys():
    values = np.random.default_rng(1).gamma(2.0, size=40)
    low, high = interval(values)
    scipys = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    width = scipys.high - scipys.low
    assert abs(low - scipys.low) < 0.05 * width and abs(high - scipys.high) < 0.05 * width
    assert interval(values) == (low, high)


def test_parts_that_fit_into_memory_change_nothing_but_the_draws():
    values = np.random.default_rng(0).normal(size=3000)  # eight parts
    low, high = interval(values)
    error = values.std() / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)


def test_one_prompt_has_no_width():
    assert interval([0.25]) == (0.25, 0.25)


def test_no_values_have_no_interval():
    for found in (lambda: interval([]), lambda: interval_of_parts([]), lambda: interval_of_parts([[1.0], []])):
        with pytest.raises(ValueError, match="no values has no interval"):
            found()
    with pytest.raises(ValueError, match="no values"):
        paired_difference({}, {})


values_of_prompts = st.dictionaries(
    st.sampled_from("abcde"), st.lists(st.none() | st.integers(0, 9).map(float), min_size=3, max_size=3), min_size=5
)


@given(values_of_prompts, values_of_prompts, st.lists(st.none() | st.integers(0, 9).map(float), min_size=5, max_size=5))
def test_systems_are_compared_on_the_same_samples(a, b, reference):
    """Against the plainest reading: a sample counts where every system has a value."""
    references = dict(zip("abcde", reference, strict=True))
    systems = {"a": rows(a), "b": rows(b), "r": rows(references)}
    same = on_same_samples(systems, "similarity")
    heard = {n: v for n, v in {"a": a, "b": b}.items() if any(x is not None for of in v.values() for x in of)}
    if len(heard) < 2 or all(value is None for value in reference):
        assert set(same.empty) >= {"a", "b"} - heard.keys()
        return
    found, left_out = same.means, same.left_out
    kept = {
        prompt: [k for k in range(3) if a[prompt][k] is not None and b[prompt][k] is not None]
        for prompt in "abcde"
        if references[prompt] is not None
    }
    kept = {prompt: numbers for prompt, numbers in kept.items() if numbers}
    for name, values in (("a", a), ("b", b)):
        assert found[name] == {p: pytest.approx(np.mean([values[p][k] for k in ks])) for p, ks in kept.items()}
    assert found["r"] == {prompt: references[prompt] for prompt in kept}
    used = sum(map(len, kept.values()))
    assert left_out == {"a": 15 - used, "b": 15 - used, "r": 5 - len(kept)} and same.empty == []


def test_a_system_without_any_value_takes_nothing_from_others():
    systems = {"a": rows({"x": [None, None], "y": [None, None]}), "b": rows({"x": 2.0, "y": None})}
    same = on_same_samples(systems, "similarity")
    assert (same.means, same.left_out, same.empty) == ({"b": {"x": 2.0}}, {"b": 1}, ["a"])
    text = table(systems)
    assert "| a |  |" in text and "| b | 2.000 (2.000 to 2.000) |" in text
    assert "1 prompt. Samples left out, as one of the systems has no value there: b 1. Without any value" in text
    assert differences(systems) == "" and "0 prompts. Without any value" in table({"a": systems["a"]})


def test_a_system_without_a_measure_takes_no_part():
    systems = {"a": rows({"x": [1.0], "y": [3.0]}), "b": rows({"x": [1.0]}, "ended")}
    same = on_same_samples(systems, "similarity")
    assert (same.means, same.left_out, same.empty) == ({"a": {"x": 1.0, "y": 3.0}}, {"a": 0}, [])
    text = table(systems)
    assert "| a | 2.000 (1.000 to 3.000) |  |" in text and "| b |  | 100.0 (100.0 to 100.0) |" in text


def test_paired_differences_are_narrower_than_their_parts():
    level = np.random.default_rng(0).normal(size=50)
    a = {str(i): float(x) for i, x in enumerate(level)}
    b = {key: value - 0.1 for key, value in a.items()}
    found = paired_difference(a, b)
    assert found["difference"] == pytest.approx(0.1) and found["interval"] == pytest.approx((0.1, 0.1))
    with pytest.raises(ValueError, match="not measured on the same prompts"):
        paired_difference(a, {"0": 1.0})


def test_logarithms_are_shown_as_perplexities_and_ratios():
    systems = {
        name: rows({"x": [math.log(low)], "y": [math.log(high)]}, "log_perplexity")
        for name, low, high in (("a", 10.0, 1000.0), ("b", 5.0, 500.0))
    }
    assert means(systems)["log_perplexity"]["a"]["mean"] == pytest.approx(100.0)
    assert "| perplexity (A / B) | a | b | 2.00 | 2.00 to 2.00 | 2 |" in differences(systems)
    shares = {name: rows({"x": [share]}, "ended") for name, share in (("a", 1.0), ("b", 0.5))}
    assert "| ended by itself (%) | a | b | 50.00 | 50.00 to 50.00 | 1 |" in differences(shares)


def test_what_was_left_out_is_said():
    systems = {"a": rows({"x": [1.0, None], "y": [None, None]}), "b": rows({"x": 2.0, "y": 3.0})}
    text = table(systems, [("others [a paper]", {"similarity": 0.346, "judge/content": 3.0})])
    assert "speaker similarity: 1 prompt. Samples left out, as one of the systems has no value there: a 3, b 1." in text
    assert "| others [a paper] | 0.346 |" in text
