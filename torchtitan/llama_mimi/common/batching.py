"""Length-bucketed batches."""

from collections.abc import Sequence


def bucket_by_length(sizes: Sequence[int], limit: float) -> list[list[int]]:
    """Return batches of indices, sorted by size. ``limit``: maximum padded size; a larger item has its own batch."""
    batches: list[list[int]] = []
    for index in sorted(range(len(sizes)), key=lambda i: sizes[i]):  # the last item is the longest of its batch
        if batches and (len(batches[-1]) + 1) * sizes[index] <= limit:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
