"""The reading half of the loader: clips of one rank, in order, read in loader workers.

Workers divide the work and not the order: worker w of n reads every n-th chunk, and the loader hands the chunks out
in turn, so that the main process sees one sequence whatever n is. Each worker reads the row groups that its chunks have
rows of, which in a shuffled block are all: decoding and resampling are divided, fetching the bytes is not.
"""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader

from llama_mimi.common.distributed import end_with_parent
from llama_mimi.common.errors import UserError
from llama_mimi.data.clip_readers import Clip, ClipReader
from llama_mimi.data.order import ClipRef, RowsInOrder, ShuffledOrder, in_chunks

# The share of bad clips is judged once this many were read: two among the first five say nothing about a corpus.
MIN_CLIPS_FOR_SHARE = 100
# Every skipped clip is counted; only so many are named one by one.
MAX_NAMED_CLIPS = 20


@dataclass
class Chunk:
    """Consecutive clips of a sequence, with their places."""

    refs: list[ClipRef]
    clips: list[Clip]


class ClipStream(torch.utils.data.IterableDataset):
    """Chunks of clips; in a loader worker only that worker's.

    A `ShuffledOrder` is cloned at each iteration, so that the caller can move it as clips are used.
    """

    def __init__(self, readers: Sequence[ClipReader], order: ShuffledOrder | RowsInOrder, chunk_size: int) -> None:
        self._readers, self._order, self._chunk_size = readers, order, chunk_size
        # Row groups of the window that is being read, for each corpus.
        self._window: list[int | None] = [None] * len(readers)
        self._groups: list[dict[int, Any]] = [{} for _ in readers]

    def load(self, **workers: Any) -> Iterator[Chunk]:
        """Read all chunks in loader workers; ``workers`` are arguments of PyTorch's DataLoader.

        Raises:
            UserError: a file is damaged.
        """
        # Its own generator: PyTorch draws a seed for the workers, which must not move the one that training draws from.
        generator = torch.Generator()
        chunks = DataLoader(
            self,
            batch_size=None,
            generator=generator,
            worker_init_fn=partial(_end_with, os.getpid()),
            **workers,
        )
        for chunk in chunks:
            if isinstance(chunk, UserError):
                raise chunk
            yield chunk

    def __iter__(self) -> Iterator[Chunk | UserError]:
        """Chunks; an error is handed over as a value, as what a worker raises would come with its traceback."""
        worker = torch.utils.data.get_worker_info()
        number, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        refs = self._order.clone() if isinstance(self._order, ShuffledOrder) else self._order
        for index, chunk in enumerate(in_chunks(refs, self._chunk_size)):
            if index % num_workers == number:
                try:
                    read = [(ref, clip) for ref in chunk for clip in self._read(ref)]
                except UserError as error:
                    yield UserError(str(error))
                    return
                yield Chunk([ref for ref, _ in read], [clip for _, clip in read])

    def _read(self, ref: ClipRef) -> list[Clip]:
        reader, groups = self._readers[ref.corpus], self._groups[ref.corpus]
        if self._window[ref.corpus] != ref.window:
            groups.clear()
            self._window[ref.corpus] = ref.window
        if ref.group not in groups:
            groups[ref.group] = reader.corpus.read_group(ref.group)
        return reader.clips(groups[ref.group], ref)


def is_too_many(num_skipped: int, num_read: int, max_skip_fraction: float, *, is_end: bool, is_whole: bool) -> bool:
    """Return True where more than the allowed fraction of the clips was skipped.

    Clips before the end, or of one rank of several, are a sample of the corpus: they may exceed the allowed number by
    three standard deviations and one. Fewer than `MIN_CLIPS_FOR_SHARE` clips are judged only at the end, where they
    count as that many, or where no bad clip is allowed.

    Args:
        is_end: there are no more clips.
        is_whole: this process reads the whole corpus.
    """
    allowed = max_skip_fraction * max(num_read, MIN_CLIPS_FOR_SHARE)
    if not (is_end and is_whole) and max_skip_fraction:
        allowed += 3 * math.sqrt(allowed) + 1
    return (is_end or num_read >= MIN_CLIPS_FOR_SHARE or not max_skip_fraction) and num_skipped > allowed


def _end_with(parent: int, worker: int) -> None:
    """End a loader worker with the process that reads from it, also if that is killed.

    It would otherwise wait for ever to hand over what it has read, as its siblings hold the pipe open, and with it the
    run's output.
    """
    end_with_parent()
    if os.getppid() != parent:  # it was killed before
        os._exit(1)
