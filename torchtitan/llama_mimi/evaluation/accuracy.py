"""Accuracies of parts and labels from the scores of pairs."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llama_mimi.evaluation.statistics import wilson_interval

# (lowest count in LibriSpeech, label) of each band, as in sLM21's own tool. Its labels are off by one: a count of 5 is
# in the band "6-20".
FREQUENCY_BANDS = ((0, "oov"), (1, "1-5"), (5, "6-20"), (20, "21-100"), (100, ">100"))


def frequency_band(frequency: float) -> str:
    """Return the band of a word by its count in LibriSpeech; see `FREQUENCY_BANDS`.

    Raises:
        ValueError: a negative count.
    """
    if frequency < 0:
        raise ValueError(f"a word cannot occur {frequency} times")
    return [name for edge, name in FREQUENCY_BANDS if edge <= frequency][-1]


def group_credits(pairs: Iterable[Mapping[str, Any]], *, by_group: bool) -> dict[tuple[str, str], float]:
    """Return the mean credit of each (part, group), or the credit of each pair.

    Args:
        pairs: pairs with the keys part, name, group and correct.
        by_group: average the pairs of one group, such as the voices of a word, first.
    """
    credits: dict[tuple[str, str], list[float]] = defaultdict(list)
    places: dict[str, int] = defaultdict(int)
    for pair in pairs:
        places[pair["part"]] += 1
        credits[pair["part"], pair["group"] if by_group else f"{places[pair['part']]}"].append(pair["correct"])
    return {key: sum(values) / len(values) for key, values in credits.items()}


def part_results(pairs: Sequence[Mapping[str, Any]], *, by_group: bool) -> dict[str, dict[str, Any]]:
    """Return the accuracy of each part, and within it by each label.

    Args:
        pairs: pairs with the keys part, name, group, labels, correct, is_tie and is_cut.
        by_group: as `group_credits`.

    Returns:
        For each part `accuracy`, `interval` (95 %), `count` (number of groups or pairs averaged), `pairs`, `ties`,
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
    """Return the unweighted mean accuracy of ``parts``, or None if one is missing.

    The interval is Wilson's for an effective count: the square of the number of parts, divided by the sum of the
    inverse counts n_i. If all k parts are equal, k^2 / sum(1/n_i) is the total number of pairs.
    """
    if any(part not in results for part in parts):
        return None
    accuracy = sum(results[part]["accuracy"] for part in parts) / len(parts)
    count = len(parts) ** 2 / sum(1 / results[part]["count"] for part in parts)
    return {"accuracy": accuracy, "interval": wilson_interval(accuracy, count), "count": round(count)}


def _place(value: str) -> tuple[int, str]:
    """Sort key: bands in their order, other values by name."""
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
