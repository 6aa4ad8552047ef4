"""From scores of pairs to accuracies: ties, groups, bands, intervals, and whether two models differ."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Z_95 = 1.959964  # 97.5 % quantile of the normal distribution
# (lowest count in LibriSpeech, label) of each band, as in sLM21's own tool. Its labels are off by one: a count of 5 is
# in the band "6-20".
FREQUENCY_BANDS = ((0, "oov"), (1, "1-5"), (5, "6-20"), (20, "21-100"), (100, ">100"))


def credit(positive_score: float, negative_score: float, tie: float) -> float:
    """1 if the positive clip scores higher, 0 if the negative one does, ``tie`` if they are equal."""
    return tie if positive_score == negative_score else float(positive_score > negative_score)


def frequency_band(frequency: float) -> str:
    """Band of a word that occurs so often in LibriSpeech; see `FREQUENCY_BANDS`.

    Raises:
        ValueError: a negative count.
    """
    if frequency < 0:
        raise ValueError(f"a word cannot occur {frequency} times")
    return [name for edge, name in FREQUENCY_BANDS if edge <= frequency][-1]


def wilson_interval(accuracy: float, count: float) -> tuple[float, float]:
    """Return the 95 % interval of a proportion (Wilson 1927, score interval without continuity correction).

    Raises:
        ValueError: ``count`` is not positive.
    """
    if not count > 0:
        raise ValueError(f"the interval of a proportion of {count} values does not exist; give at least one value")
    center = accuracy + Z_95**2 / (2 * count)
    half = Z_95 * math.sqrt(accuracy * (1 - accuracy) / count + Z_95**2 / (4 * count**2))
    scale = 1 + Z_95**2 / count
    # At 0 and 1 rounding would leave the accuracy itself outside.
    return max(0.0, min(accuracy, (center - half) / scale)), min(1.0, max(accuracy, (center + half) / scale))


def group_credits(pairs: Iterable[Mapping[str, Any]], *, by_group: bool) -> dict[tuple[str, str], float]:
    """Mean credit of each (part, group), or each pair's own where ``by_group`` is false.

    Args:
        pairs: with the keys part, name, group and correct.
        by_group: average the pairs of one group, such as the voices of a word, first.
    """
    credits: dict[tuple[str, str], list[float]] = defaultdict(list)
    places: dict[str, int] = defaultdict(int)
    for pair in pairs:
        places[pair["part"]] += 1
        credits[pair["part"], pair["group"] if by_group else f"{places[pair['part']]}"].append(pair["correct"])
    return {key: sum(values) / len(values) for key, values in credits.items()}


def part_results(pairs: Sequence[Mapping[str, Any]], *, by_group: bool) -> dict[str, dict[str, Any]]:
    """Accuracy of each part, and within it by each label.

    Args:
        pairs: with the keys part, name, group, labels, correct, is_tie and is_cut.
        by_group: as `group_credits`.

    Returns:
        For each part `accuracy`, `interval` (95 %), `count` (groups, what the interval is of), `pairs`, `ties`,
        `pairs_cut`, and `by`: the same by the values of each label, such as {"type": {"agreement": ...}}.
    """
    parts: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for pair in pairs:
        parts[pair["part"]].append(pair)
    results = {}
    for part, members in sorted(parts.items()):
        by_label: dict[str, dict[str, list[Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(list))
        for pair in members:
            for label, value in pair["labels"].items():
                by_label[label][value].append(pair)
        results[part] = _result(members, by_group) | {
            "by": {
                label: {value: _result(values[value], by_group) for value in sorted(values, key=_place)}
                for label, values in sorted(by_label.items())
            }
        }
    return results


def mean_of_parts(results: Mapping[str, Mapping[str, Any]], parts: Sequence[str]) -> dict[str, Any] | None:
    """The mean accuracy of ``parts``, each with the same weight; None unless all are there.

    The interval is Wilson's for an effective count: the square of the number of parts, divided by the sum of the
    inverse counts n_i. If all k parts are equal, k^2 / sum(1/n_i) is the total number of pairs.
    """
    if any(part not in results for part in parts):
        return None
    accuracy = sum(results[part]["accuracy"] for part in parts) / len(parts)
    count = len(parts) ** 2 / sum(1 / results[part]["count"] for part in parts)
    return {"accuracy": accuracy, "interval": wilson_interval(accuracy, count), "count": round(count)}


def mcnemar(credits_a: Mapping[Any, float], credits_b: Mapping[Any, float]) -> dict[str, Any]:
    """Exact McNemar test of two models on the same pairs (McNemar 1947; the binomial form).

    Args:
        credits_a, credits_b: credit by pair or group; one counts for a model where its credit is the higher.

    Returns:
        `a_better` and `b_better`, how many, and the two-sided `p`.

    Raises:
        ValueError: the two are not of the same pairs.
    """
    if credits_a.keys() != credits_b.keys():
        raise ValueError("the two models were not scored on the same pairs")
    a_better = sum(credits_a[key] > credits_b[key] for key in credits_a)
    b_better = sum(credits_a[key] < credits_b[key] for key in credits_a)
    discordant = a_better + b_better
    tail = term = 1  # the sum of the binomial coefficients up to the smaller number, and the last of them
    for k in range(min(a_better, b_better)):
        term = term * (discordant - k) // (k + 1)
        tail += term
    # In integers: 2**discordant is no float where there are more than a thousand.
    return {"a_better": a_better, "b_better": b_better, "p": min(1.0, 2 * tail / 2**discordant)}


def _place(value: str) -> tuple[int, str]:
    """Bands in their order, other values by name."""
    bands = [name for _, name in FREQUENCY_BANDS]
    return (bands.index(value), "") if value in bands else (len(bands), value)


def _result(pairs: Sequence[Mapping[str, Any]], by_group: bool) -> dict[str, Any]:
    credits = group_credits(pairs, by_group=by_group).values()
    accuracy = sum(credits) / len(credits)
    return {
        "accuracy": accuracy,
        "interval": wilson_interval(accuracy, len(credits)),
        "count": len(credits),
        "pairs": len(pairs),
        "ties": sum(pair["is_tie"] for pair in pairs),
        "pairs_cut": sum(pair["is_cut"] for pair in pairs),
    }
