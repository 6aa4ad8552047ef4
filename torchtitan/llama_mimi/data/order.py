"""The order in which clips are read: a position in an endless sequence, not a buffer.

Row groups are permuted as a whole in each epoch; consecutive ones form a window, and rows are permuted inside it.
Windows are numbered without end (the next epoch goes on counting) and dealt to the data-parallel ranks in turn:
rank k of W reads windows k, k + W, k + 2 W. Every permutation is a function of the seed and a number, so the state
of a run is, for each rank, the windows that it has begun and the first that it has not. Loader workers have no
part in the order, and on another number of ranks the windows left are dealt anew.
"""

import copy
import itertools
import math
from bisect import bisect
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np

# The additive recurrence with the golden ratio spreads draws most evenly: after n draws every share is met to within
# a few of n clips (Kuipers and Niederreiter, Uniform Distribution of Sequences, 1974, ch. 2, sec. 3).
_GOLDEN = (math.sqrt(5) - 1) / 2

# Fewest windows of an epoch, if there are that many row groups.
MIN_WINDOWS = 64
# Number of permutations that are kept in memory.
KEPT = 4


@dataclass(frozen=True)
class ClipRef:
    """A row of a corpus, and the frame from which on it is still to be used."""

    corpus: int
    window: int
    group: int
    row: int
    frame: int


@dataclass(order=True)
class BegunWindow:
    """A window, how many of its rows are used, and how many frames of the next row."""

    window: int
    rows_used: int = 0
    frames_used: int = 0


@dataclass
class Cursor:
    """One rank's place in one corpus."""

    begun: list[BegunWindow] = field(default_factory=list)  # windows to finish first
    next_window: int = 0  # the first window of this rank that is not begun


@dataclass
class Position:
    """One rank's place in a mixture: clips drawn so far, and a cursor a corpus."""

    drawn: int
    cursors: list[Cursor]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> "Position":
        cursors = [
            Cursor([BegunWindow(**begun) for begun in cursor["begun"]], cursor["next_window"])
            for cursor in values["cursors"]
        ]
        return Position(values["drawn"], cursors)


class CorpusOrder:
    """The windows of one corpus: at most ``shuffle_window`` rows, and at least one row group."""

    def __init__(self, rows_per_group: np.ndarray, shuffle_window: int, seed: int) -> None:
        self._sizes_G, self._seed = rows_per_group, seed
        # Small corpora have small windows, so that ranks read in the same epoch; windows of one size, so that they
        # stay beside each other.
        per_window = min(round(shuffle_window / float(rows_per_group.mean())), len(rows_per_group) // MIN_WINDOWS)
        self.windows_per_epoch = math.ceil(len(rows_per_group) / max(1, per_window))
        self._bounds = np.linspace(0, len(rows_per_group), self.windows_per_epoch + 1).round().astype(int)
        # What was computed last, by epoch and by window.
        self._group_orders: dict[int, np.ndarray] = {}
        self._windows: dict[int, np.ndarray] = {}

    def num_rows(self, window: int) -> int:
        return len(self._rows(window))

    def row(self, window: int, index: int) -> tuple[int, int]:
        """Row group and row of the ``index``-th clip of a window."""
        group, row = self._rows(window)[index]
        return int(group), int(row)

    def _rows(self, window: int) -> np.ndarray:
        if window not in self._windows:
            epoch, number = divmod(window, self.windows_per_epoch)
            groups = self._group_order(epoch)[self._bounds[number] : self._bounds[number + 1]]
            rows = [np.stack([np.full(n, g), np.arange(n)], 1) for g in groups for n in [self._sizes_G[g]]]
            order = np.random.default_rng((self._seed, window, 1)).permutation(np.concatenate(rows))
            _keep(self._windows, window, order)
        return self._windows[window]

    def _group_order(self, epoch: int) -> np.ndarray:
        if epoch not in self._group_orders:
            order = np.random.default_rng((self._seed, epoch)).permutation(len(self._sizes_G))
            _keep(self._group_orders, epoch, order)
        return self._group_orders[epoch]


def _keep(cache: dict[int, np.ndarray], key: int, value: np.ndarray) -> None:
    """Keep the last few: where the loader reads ahead, and where training stands."""
    while len(cache) >= KEPT:
        cache.pop(next(iter(cache)))
    cache[key] = value


class Corpus(Protocol):
    """What an order needs to know of a corpus: rows of its row groups, and what tells it from others."""

    rows_per_group: np.ndarray
    fingerprint: str


class ShuffledOrder:
    """One rank's endless sequence of clips from a mixture of corpora.

    Args:
        corpora: with ``rows_per_group``, rows of their row groups, and a ``fingerprint``.
        shares: of the clips drawn that each corpus has; they are scaled to sum to one.
        dp_rank, dp_world_size: this rank and how many there are.
        shuffle_window, seed: as `CorpusOrder`.
    """

    def __init__(
        self,
        corpora: Sequence[Corpus],
        shares: Sequence[float],
        *,
        dp_rank: int,
        dp_world_size: int,
        shuffle_window: int,
        seed: int,
    ) -> None:
        self.seed = seed
        # Positions mean something only in the same data and order.
        self.fingerprint = {
            "corpora": [corpus.fingerprint for corpus in corpora],
            "shuffle_window": shuffle_window,
            "seed": seed,
        }
        self._orders = [
            CorpusOrder(corpus.rows_per_group, shuffle_window, seed + k) for k, corpus in enumerate(corpora)
        ]
        self._bounds = (np.cumsum(shares)[:-1] / np.sum(shares)).tolist()
        self._dp_world_size = dp_world_size
        self.position = Position(0, [Cursor(next_window=dp_rank) for _ in corpora])

    def clone(self) -> "ShuffledOrder":
        """An independent copy that goes on from the same position."""
        other = copy.copy(self)
        other.position = copy.deepcopy(self.position)
        return other

    def __iter__(self) -> Iterator[ClipRef]:
        while True:
            yield self.take()

    def take(self) -> ClipRef:
        """The next clip; the position is then behind it."""
        corpus, begun = self._upcoming()
        place, order = begun[0], self._orders[corpus]
        ref = ClipRef(corpus, place.window, *order.row(place.window, place.rows_used), place.frames_used)
        place.rows_used, place.frames_used = place.rows_used + 1, 0
        if place.rows_used == order.num_rows(place.window):
            begun.pop(0)
        self.position.drawn += 1
        return ref

    def use_frames(self, frames: int) -> None:
        """Note that the first ``frames`` frames of the next clip are used up."""
        _, begun = self._upcoming()
        begun[0].frames_used = frames

    def _upcoming(self) -> tuple[int, list[BegunWindow]]:
        corpus = bisect(self._bounds, (self.position.drawn * _GOLDEN) % 1.0)
        cursor = self.position.cursors[corpus]
        if not cursor.begun:
            cursor.begun.append(BegunWindow(cursor.next_window))
            cursor.next_window += self._dp_world_size
        return corpus, cursor.begun


@dataclass(frozen=True)
class RowsInOrder:
    """Row groups once, in the order given, their rows dealt to the ranks one by one.

    Args:
        limit: rows of all ranks together; None for all there are.
    """

    rows_per_group: np.ndarray
    groups: Sequence[int]
    dp_rank: int = 0
    dp_world_size: int = 1
    limit: int | None = None

    def __iter__(self) -> Iterator[ClipRef]:
        rows = ((group, row) for group in self.groups for row in range(int(self.rows_per_group[group])))
        for group, row in itertools.islice(rows, self.dp_rank, self.limit, self.dp_world_size):
            yield ClipRef(0, group, group, row, 0)


def reshard(positions: Sequence[Position], dp_world_size: int) -> list[Position]:
    """The positions of all ranks, continued on ``dp_world_size`` ranks.

    On the same number of ranks each goes on where it was. On another number the unfinished windows, and those between
    them, are shared out before new ones are taken: every clip left in the epoch is read once.
    """
    if len(positions) == dp_world_size:
        return list(positions)
    dealt = [Position(max(p.drawn for p in positions), []) for _ in range(dp_world_size)]
    for cursors in zip(*(p.cursors for p in positions), strict=True):
        end = max(cursor.next_window for cursor in cursors)
        windows = [window for cursor in cursors for window in cursor.begun]
        windows += [BegunWindow(w) for c in cursors for w in range(c.next_window, end, len(positions))]
        windows.sort()
        for rank, position in enumerate(dealt):
            position.cursors.append(Cursor(windows[rank::dp_world_size], end + rank))
    return dealt


def in_chunks(refs: ShuffledOrder | RowsInOrder, size: int) -> Iterator[list[ClipRef]]:
    """Consecutive lists of at most ``size`` clips; in corpus order none goes over the end of a row group."""
    chunk: list[ClipRef] = []
    for ref in refs:
        if len(chunk) == size or (chunk and isinstance(refs, RowsInOrder) and ref.group != chunk[0].group):
            yield chunk
            chunk = []
        chunk.append(ref)
    if chunk:
        yield chunk
