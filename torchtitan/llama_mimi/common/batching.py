"""Length-bucketed batches."""

from collections.abc import Sequence


def bucket_by_length(sizes: Sequence[int], limit: float) -> list[list[int]]:
    """Divide items into batches of indices, from small to large; the result depends on the sizes only.

    Args:
        limit: maximum size of a batch including padding; a single item always fits.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(sizes)), key=lambda i: sizes[i]):  # the last item is the longest of its batch
        if batches and (len(batches[-1]) + 1) * sizes[index] <= limit:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
