"""Length-bucketed batches."""

import math
from collections.abc import Sequence


def bucket_by_length(sizes: Sequence[int], limit: float, max_ratio: float = math.inf) -> list[list[int]]:
    """Sort items by size, and return batches of indices.

    ``limit``: maximum padded size of a batch of several items. ``max_ratio``: of the largest size to the smallest one.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(sizes)), key=lambda i: sizes[i]):  # the last item is the longest of its batch
        last = batches[-1] if batches else []
        if last and (len(last) + 1) * sizes[index] <= limit and sizes[index] <= max_ratio * sizes[last[0]]:
            last.append(index)
        else:
            batches.append([index])
    return batches
