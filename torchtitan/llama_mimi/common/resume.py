"""Tools to resume long work: a check for changed settings, and a log of finished items."""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from tqdm import tqdm

from llama_mimi.common.distributed import DistributedContext, broadcast_from_rank0, gather
from llama_mimi.common.errors import UserError
from llama_mimi.common.files import digest, visible_files

Item = TypeVar("Item")
Result = TypeVar("Result")


def require_same(saved: Mapping[str, Any], current: Mapping[str, Any], what: str, remedy: str) -> None:
    """Raise a `UserError` about ``what`` if a current setting differs from the saved setting of the same name."""
    for name, value in current.items():
        before = saved.get(name)
        if isinstance(value, Mapping) and isinstance(before or {}, Mapping):
            nested = [{f"{name}.{key}": item for key, item in some.items()} for some in (before or {}, value)]
            require_same(nested[0], nested[1], what, remedy)
        elif before != value:
            was = repr(before) if name in saved else "not set"
            raise UserError(f"{what} was made with {name} = {was}, but the current value is {value!r}; {remedy}")


class ProgressLog:
    """Append-only log of finished items. ``header`` contains all settings that change the results of the items."""

    def __init__(self, folder: Path, header: Mapping[str, Any]) -> None:
        self._folder = folder / digest(header)[:16]
        self._path = self._folder / f"{uuid4().hex}.jsonl"

    def load(self) -> dict[str, Any]:
        """Return the logged results by item."""
        done: dict[str, Any] = {}
        for path in visible_files(self._folder, "*.jsonl"):
            for line in path.read_text().split("\n")[:-1]:  # a kill can truncate the last line
                done |= json.loads(line)
        return done

    def add(self, results: Mapping[str, Any]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(json.dumps(results) + "\n")

    def close(self) -> None:
        """Delete this log; if its parent folder is then empty, delete the folder, too."""
        shutil.rmtree(self._folder, ignore_errors=True)
        with suppress(OSError):
            self._folder.parent.rmdir()


def map_resumable(
    batches: Sequence[Mapping[str, Item]],
    work: Callable[[Mapping[str, Item]], Iterable[tuple[str, Result]]],
    log: ProgressLog,
    ranks: DistributedContext,
    *,
    unit: str,
    is_done: Callable[[str, Result], bool] = lambda key, result: True,
) -> dict[str, Result]:
    """Return the results of all items by key, in the order of ``batches``. Every rank gets all results.

    The batches are divided among the ranks. A batch is skipped if all its results are in the log.

    Args:
        batches: items by key; a restart needs the same batches, because a result may depend on the whole batch.
        work: function that yields the key and the result of each item of a batch, in any order.
        unit: noun for one item, printed in the progress bar.
        is_done: function that returns False for a result that must not be logged; a restart computes this item again.
    """
    done = broadcast_from_rank0(lambda: {key: result for key, result in log.load().items() if is_done(key, result)})
    todo = [batch for batch in batches if not batch.keys() <= done.keys()]
    num_items, num_todo = sum(map(len, batches)), sum(map(len, todo))
    if ranks.rank == 0 and num_todo < num_items:
        print(f"{num_items - num_todo:,} of {num_items:,} {unit}s were already finished", flush=True)
    mine = todo[ranks.rank :: ranks.world_size]
    new: dict[str, Result] = {}
    with tqdm(total=sum(map(len, mine)), unit=unit, desc=f"{unit}s", disable=ranks.rank > 0 or not mine) as progress:
        for key, result in (pair for batch in mine for pair in work(batch)):
            if is_done(key, result):
                log.add({key: result})
            new[key] = result
            progress.update()
    for part in gather(new):
        done |= part
    return {key: done[key] for batch in batches for key in batch}
