"""Length-bucketed batches and background prefetching."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def batches_of_like_size(sizes: Sequence[int], limit: float) -> list[list[int]]:
    """Divide items into batches by size; the result depends on the sizes only.

    Args:
        sizes: size of each item, such as its samples or tokens.
        limit: maximum size of a batch including padding; a single item always fits.

    Returns:
        Indices into ``sizes``, each once; batches and the items in them go from small to large.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(sizes)), key=lambda i: sizes[i]):  # the last item is the longest of its batch
        if batches and (len(batches[-1]) + 1) * sizes[index] <= limit:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def map_ahead(function: Callable[[Item], Result], items: Iterable[Item], num_ahead: int) -> Iterator[Result]:
    """Like ``map``, with a thread that computes up to ``num_ahead`` results in advance (none for 0).

    The caller's thread iterates over ``items``. An error of ``items`` comes after the results of earlier items.
    """
    if not num_ahead:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(1, thread_name_prefix="ahead")

    def futures() -> Iterator[Future[Result]]:
        try:
            for item in items:
                yield pool.submit(function, item)
        except Exception as error:
            failed: Future[Result] = Future()
            failed.set_exception(error)
            yield failed

    ahead: deque[Future[Result]] = deque()
    try:
        for future in futures():
            ahead.append(future)
            if len(ahead) > num_ahead:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
