"""Order of training clips: an endless sequence. The position of a rank in the sequence is saved as a few numbers."""

import copy
import itertools
import math
from bisect import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from llama_mimi.common.choices import Task
from llama_mimi.corpora.clips import AudioReader, TextCorpus
from llama_mimi.corpora.code_shards import CodeCorpus
from llama_mimi.corpora.utterances import CLIPS_PER_BLOCK, UtteranceCorpus


class Stream(NamedTuple):
    """A corpus that is read for a task. For a second task, the same corpus is a second stream."""

    task: Task
    reader: AudioReader | CodeCorpus | TextCorpus


# An additive recurrence with the golden ratio spreads the draws of each stream evenly: after any number of draws, the
# number from each stream is exact to a few clips (Kuipers and Niederreiter, Uniform Distribution of Sequences, 1974).
_GOLDEN = (math.sqrt(5) - 1) / 2

MIN_WINDOWS = 64  # minimum number of windows in an epoch, if the corpus has that many units
CACHED_WINDOWS = 4  # enough for a loader that reads ahead of training


class ClipRef(NamedTuple):
    """Position of a row in the order and in its corpus."""

    stream: int
    window: int
    unit: int
    row: int
    start: int = 0  # first unused frame; for a text or utterances, see `ExampleBuilder`


@dataclass(order=True)
class BegunWindow:
    """A partly used window."""

    window: int
    rows_used: int = 0
    frames_used: int = 0  # used units of the next row (frames of a clip; see `ExampleBuilder`)


@dataclass
class Cursor:
    """Position of one rank in one stream."""

    begun: list[BegunWindow] = field(default_factory=list)  # windows to finish first
    next_window: int = 0  # this rank's first unused window


@dataclass
class Position:
    """Position of one rank in a mixture of streams."""

    drawn: int  # number of clips so far
    cursors: list[Cursor]


class CorpusOrder:
    """Windows of one corpus. A window has one or more units, and about ``shuffle_window`` rows.

    In each epoch the units are permuted. Consecutive units form a window. The rows of each window are permuted.
    """

    def __init__(self, rows_per_unit: np.ndarray, shuffle_window: int, seed: int) -> None:
        self._rows_per_unit, self._seed = rows_per_unit, seed
        # A small corpus has small windows, so that all ranks are in the same epoch. Windows have almost equal sizes.
        num_units = len(rows_per_unit)
        units_per_window = max(1, min(round(shuffle_window / float(rows_per_unit.mean())), num_units // MIN_WINDOWS))
        self.windows_per_epoch = math.ceil(num_units / units_per_window)
        self._bounds = np.linspace(0, num_units, self.windows_per_epoch + 1).round().astype(int)
        self._cache: dict[int, np.ndarray] = {}

    def rows(self, window: int) -> np.ndarray:
        """Return the shuffled rows of a window as pairs (N, 2): a unit, and the index of a row in this unit."""
        if window not in self._cache:
            epoch, number = divmod(window, self.windows_per_epoch)
            order = np.random.default_rng((self._seed, epoch)).permutation(len(self._rows_per_unit))
            units = order[self._bounds[number] : self._bounds[number + 1]]
            sizes = self._rows_per_unit[units]
            rows_N2 = np.stack([np.repeat(units, sizes), np.concatenate([np.arange(n) for n in sizes])], 1)
            if len(self._cache) == CACHED_WINDOWS:
                self._cache.pop(next(iter(self._cache)))
            self._cache[window] = np.random.default_rng((self._seed, window, 1)).permutation(rows_N2)
        return self._cache[window]


@dataclass
class ShuffledOrder:
    """Endless sequence of clips for one rank; ``fractions`` are the relative numbers of clips from each stream.

    Windows are numbered across epochs, and rank k of W reads windows k, k + W, k + 2 W. A permutation depends
    only on the seed and on the number of the epoch or window. So a position consists only of the rank's partly
    used windows and its next window. `reshard` divides the remaining windows among another number of ranks.
    """

    streams: Sequence[Stream]
    fractions: Sequence[float]
    dp_rank: int
    dp_world_size: int
    shuffle_window: int
    seed: int

    def __post_init__(self) -> None:
        tasks, readers = zip(*self.streams, strict=True)
        corpora, window, seed = [reader.fingerprint for reader in readers], self.shuffle_window, self.seed
        self.fingerprint: dict[str, Any] = {"corpora": corpora, "shuffle_window": window, "seed": seed}
        if set(tasks) != {"audio"}:
            self.fingerprint["tasks"] = list(tasks)
        self._orders = []
        for number, reader in enumerate(readers):
            num_rows = window // CLIPS_PER_BLOCK if isinstance(reader, UtteranceCorpus) else window
            self._orders.append(CorpusOrder(reader.rows_per_unit, num_rows, seed + number))
        self._bounds = (np.cumsum(self.fractions)[:-1] / np.sum(self.fractions)).tolist()
        self.position = Position(0, [Cursor(next_window=self.dp_rank) for _ in self.streams])

    def __iter__(self) -> Iterator[ClipRef]:
        """Yield the next clips without moving the position."""
        ahead = copy.copy(self)
        ahead.position = copy.deepcopy(self.position)
        while True:
            yield ahead.next_clip()

    def next_clip(self) -> ClipRef:
        """Return the next clip and move the position past it."""
        stream, begun = self._upcoming()
        place = begun[0]
        rows_N2 = self._orders[stream].rows(place.window)
        unit, row = rows_N2[place.rows_used].tolist()
        ref = ClipRef(stream, place.window, unit, row, place.frames_used)
        place.rows_used, place.frames_used = place.rows_used + 1, 0
        if place.rows_used == len(rows_N2):
            begun.pop(0)
        self.position.drawn += 1
        return ref

    def use_frames(self, num_frames: int) -> None:
        """Record that ``num_frames`` frames (or other units) of the next clip have been used."""
        self._upcoming()[1][0].frames_used = num_frames

    def _upcoming(self) -> tuple[int, list[BegunWindow]]:
        """Return the stream of the next clip, and the partly used windows of this stream in reading order."""
        stream = bisect(self._bounds, (self.position.drawn * _GOLDEN) % 1.0)
        cursor = self.position.cursors[stream]
        if not cursor.begun:
            cursor.begun.append(BegunWindow(cursor.next_window))
            cursor.next_window += self.dp_world_size
        return stream, cursor.begun


@dataclass(frozen=True)
class RowsInOrder:
    """First ``limit`` rows (-1: all rows) of each stream, in order. Each of W ranks reads every W-th row."""

    streams: Sequence[Stream]
    dp_rank: int = 0
    dp_world_size: int = 1
    limit: int = -1

    def __iter__(self) -> Iterator[ClipRef]:
        for number, stream in enumerate(self.streams):
            units = enumerate(stream.reader.rows_per_unit.tolist())
            rows = (ClipRef(number, unit, unit, row) for unit, size in units for row in range(size))
            stop = None if self.limit == -1 else self.limit
            yield from itertools.islice(rows, self.dp_rank, stop, self.dp_world_size)


def reshard(positions: Sequence[Position], dp_world_size: int) -> list[Position]:
    """Convert the positions of all ranks to positions of ``dp_world_size`` ranks.

    If the number of ranks is the same, the positions do not change. Otherwise the partly used windows, and the unused
    windows between them, are divided among the ranks. So every remaining clip of the epoch is read once.
    """
    if len(positions) == dp_world_size:
        return list(positions)
    resharded = [Position(max(p.drawn for p in positions), []) for _ in range(dp_world_size)]
    for cursors in zip(*(p.cursors for p in positions), strict=True):
        end = max(cursor.next_window for cursor in cursors)
        windows = [window for cursor in cursors for window in cursor.begun]
        windows += [BegunWindow(w) for c in cursors for w in range(c.next_window, end, len(positions))]
        for rank, position in enumerate(resharded):
            position.cursors.append(Cursor(sorted(windows)[rank::dp_world_size], end + rank))
    return resharded
