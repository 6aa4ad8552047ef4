"""The order of training clips: a position in an endless sequence, not a buffer."""

import copy
import itertools
import math
from bisect import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from llama_mimi.corpora.clips import AudioReader
from llama_mimi.corpora.code_shards import CodeCorpus

ClipReader = AudioReader | CodeCorpus

# The additive recurrence with the golden ratio spreads draws most evenly: after n draws every fraction is met to within
# a few of n clips (Kuipers and Niederreiter, Uniform Distribution of Sequences, 1974, ch. 2, sec. 3).
_GOLDEN = (math.sqrt(5) - 1) / 2

MIN_WINDOWS = 64  # of an epoch, if the corpus has that many units
CACHED_WINDOWS = 4  # the loader reads ahead of training


class ClipRef(NamedTuple):
    """Place of a row in the order and in its corpus."""

    corpus: int
    window: int
    unit: int
    row: int
    frame: int = 0  # the first that is not used


@dataclass(order=True)
class BegunWindow:
    """A window that is not finished."""

    window: int
    rows_used: int = 0
    frames_used: int = 0  # of the next row


@dataclass
class Cursor:
    """One rank's place in one corpus."""

    begun: list[BegunWindow] = field(default_factory=list)  # windows to finish first
    next_window: int = 0  # the first window of this rank that is not begun


@dataclass
class Position:
    """One rank's place in a mixture of corpora."""

    drawn: int  # clips so far
    cursors: list[Cursor]

    @staticmethod
    def from_json(values: dict[str, Any]) -> "Position":
        cursors = [Cursor([BegunWindow(**b) for b in c["begun"]], c["next_window"]) for c in values["cursors"]]
        return Position(values["drawn"], cursors)


class CorpusOrder:
    """The windows of one corpus, of at most ``shuffle_window`` rows and at least one unit.

    In each epoch units are permuted as a whole; consecutive units form a window, and rows are permuted inside it.
    """

    def __init__(self, rows_per_unit: np.ndarray, shuffle_window: int, seed: int) -> None:
        self._rows_per_unit, self._seed = rows_per_unit, seed
        # A small corpus has small windows, so that ranks read in the same epoch. Equal windows keep ranks side by side.
        num_units = len(rows_per_unit)
        units_per_window = max(1, min(round(shuffle_window / float(rows_per_unit.mean())), num_units // MIN_WINDOWS))
        self.windows_per_epoch = math.ceil(num_units / units_per_window)
        self._bounds = np.linspace(0, num_units, self.windows_per_epoch + 1).round().astype(int)
        self._cache: dict[int, np.ndarray] = {}

    def rows(self, window: int) -> np.ndarray:
        """Return the rows of a window in order: unit and row, an array (N, 2)."""
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


class ShuffledOrder:
    """One rank's endless sequence of clips; ``fractions`` of them, which need not sum to one, come from each corpus.

    Windows are numbered without end, across epochs, and rank k of W reads windows k, k + W, k + 2 W. A permutation is
    a function of the seed and a number, so a position is a few numbers: the windows that the rank has begun, and the
    first that it has not. On another number of ranks the remaining windows are shared out again (`reshard`).
    """

    def __init__(
        self,
        readers: Sequence[ClipReader],
        fractions: Sequence[float],
        dp_rank: int,
        dp_world_size: int,
        shuffle_window: int,
        seed: int,
    ) -> None:
        self.dp_rank, self.dp_world_size, self.seed = dp_rank, dp_world_size, seed
        corpora = [reader.fingerprint for reader in readers]
        self.fingerprint = {"corpora": corpora, "shuffle_window": shuffle_window, "seed": seed}
        self._orders = [CorpusOrder(reader.rows_per_unit, shuffle_window, seed + k) for k, reader in enumerate(readers)]
        self._bounds = (np.cumsum(fractions)[:-1] / np.sum(fractions)).tolist()
        self.position = Position(0, [Cursor(next_window=dp_rank) for _ in readers])

    def __iter__(self) -> Iterator[ClipRef]:
        """Yield the clips from here on, without moving the position."""
        ahead = copy.copy(self)
        ahead.position = copy.deepcopy(self.position)
        while True:
            yield ahead.next_clip()

    def next_clip(self) -> ClipRef:
        """Return the next clip and move the position behind it."""
        corpus, begun = self._upcoming()
        place = begun[0]
        rows_N2 = self._orders[corpus].rows(place.window)
        unit, row = rows_N2[place.rows_used].tolist()
        ref = ClipRef(corpus, place.window, unit, row, place.frames_used)
        place.rows_used, place.frames_used = place.rows_used + 1, 0
        if place.rows_used == len(rows_N2):
            begun.pop(0)
        self.position.drawn += 1
        return ref

    def use_frames(self, num_frames: int) -> None:
        """Record that the first frames of the next clip are used."""
        self._upcoming()[1][0].frames_used = num_frames

    def _upcoming(self) -> tuple[int, list[BegunWindow]]:
        """Return the corpus of the next clip, and its begun windows, at least one."""
        corpus = bisect(self._bounds, (self.position.drawn * _GOLDEN) % 1.0)
        cursor = self.position.cursors[corpus]
        if not cursor.begun:
            cursor.begun.append(BegunWindow(cursor.next_window))
            cursor.next_window += self.dp_world_size
        return corpus, cursor.begun


@dataclass(frozen=True)
class RowsInOrder:
    """The rows of a corpus once, in its order, dealt to the ranks one by one; ``limit`` of all ranks, or -1 for all."""

    rows_per_unit: np.ndarray
    dp_rank: int = 0
    dp_world_size: int = 1
    limit: int = -1

    def __iter__(self) -> Iterator[ClipRef]:
        rows = (ClipRef(0, u, u, row) for u, n in enumerate(self.rows_per_unit.tolist()) for row in range(n))
        return itertools.islice(rows, self.dp_rank, None if self.limit == -1 else self.limit, self.dp_world_size)


def reshard(positions: Sequence[Position], dp_world_size: int) -> list[Position]:
    """Return the positions with which ``dp_world_size`` ranks continue those of all ranks before.

    The same number of ranks continues unchanged. Another number first shares out the unfinished windows and those
    between them, so that every remaining clip of the epoch is read once.
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
