"""Accuracies and intervals from scores."""

import pytest

from llama_mimi.evaluation.benchmarks import SALMON_PARTS
from llama_mimi.evaluation.results import mean_of_parts, part_results
from llama_mimi.evaluation.statistics import wilson_interval


def pair(name="0", correct=1.0, group=None, part="a", is_tie=False, is_cut=False, **labels):
    known = {"part": part, "name": name, "group": group or name, "correct": correct}
    return known | {"is_tie": is_tie, "is_cut": is_cut, "labels": labels}


# Word 0 has four voices, word 1 has one, word 2 has two.
VOICES = [("0", 1.0), ("0", 1.0), ("0", 1.0), ("0", 0.0), ("1", 0.0), ("2", 1.0), ("2", 0.5)]


@pytest.mark.parametrize(("by_group", "accuracy", "count"), [(True, (0.75 + 0.0 + 0.75) / 3, 3), (False, 4.5 / 7, 7)])
def test_voices_are_averaged_before_words(by_group, accuracy, count):
    pairs = [pair(f"{word}_{i}", correct, word) for i, (word, correct) in enumerate(VOICES)]
    result = part_results(pairs, by_group=by_group)["a"]
    assert result["accuracy"] == pytest.approx(accuracy) and (result["count"], result["pairs"]) == (count, 7)
    assert result["interval"] == wilson_interval(result["accuracy"], count)
    assert part_results([pair("x"), pair("x")], by_group=by_group)["a"]["count"] == 2 - by_group


def test_bands_and_types():
    pairs = [
        pair("0", 1.0, frequency="oov"),
        pair("1", 0.0, frequency="oov", is_cut=True),
        pair("2", 1.0, frequency=">100"),
        pair("3", 0.0),  # a word without a frequency has no band, as in the official tool
        pair("0", 0.5, part="b", is_tie=True, type="order", subtype="noun"),
    ]
    results = part_results(pairs, by_group=True)
    by = results["a"]["by"]["frequency"]
    assert list(by) == ["oov", ">100"] and results["a"]["accuracy"] == 0.5  # ordered by frequency
    assert (by["oov"]["accuracy"], by["oov"]["count"], by["oov"]["pairs_cut"]) == (0.5, 2, 1)
    assert results["b"]["by"]["type"]["order"]["ties"] == 1 and list(results["b"]["by"]) == ["subtype", "type"]


def test_the_mean_is_that_of_all_eight_parts_or_none():
    parts = {part: {"accuracy": i / 10, "count": 200} for i, part in enumerate(SALMON_PARTS)}
    mean = mean_of_parts(parts, SALMON_PARTS)
    assert mean == {"accuracy": pytest.approx(0.35), "count": 1600, "interval": wilson_interval(mean["accuracy"], 1600)}
    uneven = parts | {SALMON_PARTS[0]: {"accuracy": 0.0, "count": 20}}
    assert mean_of_parts(uneven, SALMON_PARTS)["count"] == round(64 / (7 / 200 + 1 / 20))
    assert mean_of_parts(parts, [*SALMON_PARTS, "another"]) is None
