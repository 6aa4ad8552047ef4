"""The reading half of the loader: an endless, resumable, sharded stream of clips, run in loader workers."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from torch.distributed.checkpoint.stateful import Stateful

from llama_mimi.audio import AudioError, read_audio


@dataclass(frozen=True)
class SkippedClip:
    """A row that could not be used: its reason (a short category) and one sentence that names it."""

    reason: str
    message: str


@dataclass(frozen=True)
class Clip:
    """One usable row.

    Args:
        name: id or path, for messages.
        samples_S: mono float32 at the codec's rate.
        is_cut: the recording went on after ``max_audio_seconds``.
        text: transcript, or None where the task needs none.
    """

    name: str
    samples_S: torch.Tensor
    is_cut: bool
    text: str | None


@dataclass
class ClipBatch:
    """``batch_size`` clips (fewer at the end of a finite stream) and the rows skipped on the way to them."""

    clips: list[Clip] = field(default_factory=list)
    skipped: list[SkippedClip] = field(default_factory=list)


@dataclass
class _Position:
    """Where a stream stands: enough to continue it exactly."""

    epoch: int = 0
    block: int = 0
    rows: dict[str, Any] | None = None  # state of the row stream at the start of the block; None is its beginning
    taken: int = 0  # rows of the block already read


class ClipStream(torch.utils.data.IterableDataset, Stateful):
    """Rows -> batches of clips, sharded by `datasets` over data-parallel ranks and loader workers.

    Order: files are shuffled each epoch; rows are read in blocks of ``shuffle_block`` and permuted inside. Every
    permutation is a function of (seed, epoch, block), so the state is a position and not a buffer, and a resumed
    stream is the same stream.

    Args:
        rows: from `open_corpus`.
        batch_size: clips a batch.
        dp_rank, dp_world_size: this process's share.
        sample_rate_hz, frame_size: of the codec; shorter clips than a frame are skipped.
        max_seconds: longer clips are cut.
        seed: of the order; None keeps the corpus order.
        shuffle_block: rows permuted together.
        is_endless: start a new epoch at the end.
    """

    def __init__(
        self,
        rows: IterableDataset,
        *,
        batch_size: int,
        dp_rank: int,
        dp_world_size: int,
        sample_rate_hz: int,
        frame_size: int,
        max_seconds: float,
        seed: int | None,
        shuffle_block: int,
        is_endless: bool,
    ) -> None:
        if rows.num_shards % dp_world_size:  # split Parquet files by row group, so that ranks read different bytes
            rows = rows.reshard()
        self._rows = rows
        self._batch_size = batch_size
        self._dp_rank, self._dp_world_size = dp_rank, dp_world_size
        self._sample_rate_hz, self._frame_size, self._max_seconds = sample_rate_hz, frame_size, max_seconds
        self._seed, self._shuffle_block, self._is_endless = seed, shuffle_block, is_endless
        self._position = _Position()
        self.max_workers = max(rows.num_shards // dp_world_size, 1)

    def __iter__(self) -> Iterator[ClipBatch]:
        """Batches without end, or one epoch; a batch without clips says that a whole epoch had none to offer."""
        batch = ClipBatch()
        while True:
            is_whole_epoch = self._position == _Position(epoch=self._position.epoch)
            has_clips = False
            for row in self._rest_of_epoch():
                clip = self._read(row)
                if isinstance(clip, SkippedClip):
                    batch.skipped.append(clip)
                    continue
                batch.clips.append(clip)
                has_clips = True
                if len(batch.clips) == self._batch_size:
                    yield batch
                    batch = ClipBatch()
            self._position = _Position(epoch=self._position.epoch + 1 if self._is_endless else 0)
            if not self._is_endless:
                if batch.clips or batch.skipped:
                    yield batch
                return
            if is_whole_epoch and not has_clips:
                yield batch
                batch = ClipBatch()

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self._position))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._position = _Position(**state_dict)

    def _rest_of_epoch(self) -> Iterator[dict[str, Any]]:
        """Rows from the position on; the position is moved before a row is handed out."""
        position = self._position
        rows = self._shuffled_files(position.epoch)
        # Uneven shares are fine, as epochs have no common end; only a corpus of too few shards is dealt out row by row.
        strategy = "shards" if rows.num_shards >= self._dp_world_size else "auto"
        rows = split_dataset_by_node(rows, self._dp_rank, self._dp_world_size, strategy=strategy)
        if position.rows is not None:
            rows.load_state_dict(position.rows)
        stream = iter(rows)
        while block := list(itertools.islice(stream, self._shuffle_block)):
            for index in self._block_order(len(block))[position.taken :]:
                position.taken += 1
                yield block[index]
            position.rows, position.block, position.taken = rows.state_dict(), position.block + 1, 0

    def _shuffled_files(self, epoch: int) -> IterableDataset:
        if self._seed is None:
            return self._rows
        # A buffer of one row shuffles the files only, and keeps the stream resumable to the row.
        seed = int(np.random.default_rng((self._seed, epoch)).integers(2**31))
        return self._rows.shuffle(seed=seed, buffer_size=1, max_buffer_input_shards=1)

    def _block_order(self, num_rows: int) -> list[int]:
        if self._seed is None:
            return list(range(num_rows))
        generator = np.random.default_rng((self._seed, self._position.epoch, self._position.block))
        return generator.permutation(num_rows).tolist()

    def _read(self, row: dict[str, Any]) -> Clip | SkippedClip:
        audio = row["audio"] or {}
        name = str(row.get("id") or audio.get("path") or "a row without id")
        if "text" in row and not row["text"]:
            return SkippedClip("no text", f"'{name}' has no text")
        source = audio.get("bytes") if audio.get("bytes") is not None else audio.get("path")
        if source is None:
            return SkippedClip("no audio", f"'{name}' has neither audio bytes nor a path")
        try:
            waveform = read_audio(
                source,
                self._sample_rate_hz,
                max_seconds=self._max_seconds,
                name=name,
                min_samples=self._frame_size,
            )
        except AudioError as error:
            return SkippedClip(error.reason, str(error))
        return Clip(name, waveform.samples_S, waveform.is_cut, row.get("text"))
