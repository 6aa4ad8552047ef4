"""Length-bucketed batches and background prefetching."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


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


def prefetch_map(function: Callable[[Item], Result], items: Iterable[Item], num_ahead: int) -> Iterator[Result]:
    """Like ``map``, with up to ``num_ahead`` results computed in advance by a thread; the caller's reads the items."""
    ahead: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(1, thread_name_prefix="ahead")
    try:
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) > num_ahead:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
