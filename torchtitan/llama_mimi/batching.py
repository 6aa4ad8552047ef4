"""Batches of like size, so that little of them is padding."""

from collections.abc import Sequence


def batches_of_like_size(sizes: Sequence[int], limit: float) -> list[list[int]]:
    """Divide items into batches by size; the plan depends on the sizes alone.

    Args:
        sizes: of the items, such as samples or tokens.
        limit: the most a batch holds with its padding; one item always fits.

    Returns:
        Indices into ``sizes``, each once; batches and the items in them go from small to large.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(sizes)), key=lambda i: sizes[i]):  # the last is its batch's longest
        if batches and (len(batches[-1]) + 1) * sizes[index] <= limit:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
