"""Length-bucketed batches."""

from collections.abc import Sequence


def bucket_by_length(sizes: Sequence[int], limit: float) -> list[list[int]]:
    """Sort items by size, and return batches of indices. ``limit``: maximum padded size of a batch of several items."""
    batches: list[list[int]] = []
    for index in sorted(range(len(sizes)), key=lambda i: sizes[i]):  # the last item is the longest of its batch
        if batches and (len(batches[-1]) + 1) * sizes[index] <= limit:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
