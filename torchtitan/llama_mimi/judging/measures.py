"""What a measure is, and how any of them is taken of many inputs: shared by ranks, and kept when a run is killed."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tqdm import tqdm

from llama_mimi.common.ranks import Ranks, from_first, gather
from llama_mimi.common.resume import ProgressLog

Input = TypeVar("Input", contravariant=True)
# A value that begins so is why there is none; it is not kept, so that the next run tries again.
FAILED = "failed: "


class Measure(Protocol[Input]):
    """Something that can be told of an input, such as a pair of clips or of texts.

    Args:
        name: of the measure, and of what is kept of it.
    """

    name: str

    def describe(self) -> dict[str, Any]:
        """All that its values depend on beside the input: models with their hashes, versions, settings."""
        ...

    def values(self, inputs: Sequence[Input]) -> Iterator[tuple[int, Any]]:
        """The place of an input and its value, which JSON can hold, in any order."""
        ...


@dataclass(frozen=True)
class Stage:
    """What a measure cost: inputs that were not known before, and the seconds that all ranks took for them."""

    inputs: int
    seconds: float


def take(
    measure: Measure[Input], inputs: Mapping[str, Input], folder: Path, ranks: Ranks
) -> tuple[dict[str, Any], Stage]:
    """The value of each input, by key.

    Args:
        inputs: by a hash of all that the value depends on.
        folder: where values of all runs are kept, so that nothing is measured twice.
        ranks: that share the inputs.

    Raises:
        UserError: the measure cannot go on, or the file system refuses.
    """
    log = _log(measure, folder)
    done = from_first(log.load)
    todo = [key for key in inputs if key not in done]
    mine = todo[ranks.rank :: ranks.world_size]
    new: dict[str, Any] = {}
    began = time.perf_counter()
    with tqdm(total=len(mine), desc=measure.name, disable=ranks.rank > 0 or not mine) as progress:
        for place, value in measure.values([inputs[key] for key in mine]) if mine else ():
            if isinstance(value, float) and not math.isfinite(value):
                value = f"{FAILED}not finite"
            new[mine[place]] = value
            if not (isinstance(value, str) and value.startswith(FAILED)):
                log.add({mine[place]: value})
            progress.update()
    for others in gather(new):
        done |= others
    return {key: done[key] for key in inputs}, Stage(len(todo), round(time.perf_counter() - began, 2))


def missing(measure: Measure[Input], inputs: Mapping[str, Input], folder: Path) -> list[str]:
    """Keys of inputs whose value is not known yet."""
    done = _log(measure, folder).load()
    return [key for key in inputs if key not in done]


def _log(measure: Measure, folder: Path) -> ProgressLog:
    return ProgressLog(folder / measure.name, measure.describe())


def in_batches(inputs: Sequence[Any], size: int) -> Iterator[tuple[int, Sequence[Any]]]:
    """Inputs in batches of neighbours, each with the place of its first."""
    for start in range(0, len(inputs), size):
        yield start, inputs[start : start + size]
