"""Batches of like size, so that little of them is padding, and work that is done beside other work."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


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


def map_ahead(function: Callable[[Item], Result], items: Iterable[Item], num_ahead: int) -> Iterator[Result]:
    """``function`` of each item, in their order; a thread is up to ``num_ahead`` items ahead of what is taken.

    Items are taken from ``items`` by the caller's thread. With 0 there is no other.
    """
    if not num_ahead:
        yield from map(function, items)
        return
    ahead: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(1, thread_name_prefix="ahead")
    failure: Exception | None = None
    iterator = iter(items)
    try:
        while True:
            try:
                item = next(iterator)
            except StopIteration:
                break
            except Exception as error:
                failure = error  # after the results of what came before
                break
            ahead.append(pool.submit(function, item))
            if len(ahead) > num_ahead:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
        if failure:
            raise failure
    finally:
        pool.shutdown(cancel_futures=True)
