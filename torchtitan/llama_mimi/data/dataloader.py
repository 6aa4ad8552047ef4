"""The dataloader: encode the audio that workers read, in batches on the training device, and pack tokens into batches.

The state is a position (`llama_mimi.data.order`): that after the last clip that a batch has used, not after what
workers have read ahead.
"""

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.tools.logging import logger

from llama_mimi.audio.mimi import MimiCodec
from llama_mimi.common.distributed import gather
from llama_mimi.common.errors import UserError
from llama_mimi.common.resume import require_same
from llama_mimi.data.clip_readers import AudioClip, ClipReader, CodedClip, SkippedClip
from llama_mimi.data.clips import MAX_NAMED_CLIPS, MIN_CLIPS_FOR_SHARE, Chunk, ClipStream, is_too_many
from llama_mimi.data.order import ClipRef, Position, RowsInOrder, ShuffledOrder, reshard
from llama_mimi.data.packing import Batch, BatchPacker

# How often the counts are logged.
CLIPS_PER_REPORT = 1000


@dataclass
class DataMeter:
    """Counts of a loader for the metrics; after a resume rank 0 goes on from the sum of all ranks."""

    codec_seconds: float = 0.0  # spent encoding since it was last reset
    num_clips: int = 0  # in the batches so far
    num_frames: int = 0


class SpeechDataLoader(BaseDataLoader):
    """Batches of token ids from chunks of clips.

    Args:
        readers: one per corpus.
        order: this rank's clips: a `ShuffledOrder`, endless and resumable, or rows to read once.
        codec: None where all corpora are codes.
        dataset: its name, for messages.
        chunk_size: clips read and encoded at once.
        max_skip_fraction: raise when a larger fraction of the clips cannot be used.
        workers: keyword arguments of PyTorch's DataLoader.
        depth_train_fraction: fraction of the frames that train the depth decoder of the hierarchical architecture.
    """

    def __init__(
        self,
        readers: list[ClipReader],
        order: ShuffledOrder | RowsInOrder,
        packer: BatchPacker,
        codec: MimiCodec | None,
        *,
        dp_rank: int,
        dp_world_size: int,
        dataset: str,
        chunk_size: int,
        max_skip_fraction: float,
        workers: dict[str, Any],
        meter: DataMeter | None = None,
        depth_train_fraction: float = 1.0,
    ) -> None:
        self._readers, self._order, self._packer, self._codec = readers, order, packer, codec
        self._dp_rank, self._dp_world_size = dp_rank, dp_world_size
        self.dataset, self._chunk_size, self._max_bad_share = dataset, chunk_size, max_skip_fraction
        self._workers = workers
        self._meter, self._depth_share = meter or DataMeter(), depth_train_fraction
        self._counts: Counter[str] = Counter()  # clips read, cut, and skipped by reason
        self._num_frames = 0
        self._num_clips = sum(int(reader.corpus.rows_per_group.sum()) for reader in readers)

    def __iter__(self) -> Iterator[Batch]:
        """Batches without end, or the rows once, the last batch filled up with padding.

        Raises:
            UserError: too many clips, or all of them, cannot be used.
        """
        for ref, clip in self._clips():
            if isinstance(clip, CodedClip) and clip.text is not None and (why := self._packer.no_room(clip.text)):
                clip = SkippedClip("text too long", f"'{clip.name}' cannot be used: {why}")
            self._count(ref, clip)
            if isinstance(clip, SkippedClip):
                self._use_up(ref)
                continue
            codes_TQ, frame = clip.codes_TQ, ref.frame
            if frame >= len(codes_TQ):  # resumed with a shorter max_audio_seconds
                self._use_up(ref)
            is_deep_T = self._deep_frames(ref, len(codes_TQ))
            while frame < len(codes_TQ):
                frame += self._packer.add(
                    codes_TQ[frame:],
                    is_cut=clip.is_cut,
                    text=clip.text,
                    is_deep_T=None if is_deep_T is None else is_deep_T[frame:],
                )
                if frame < len(codes_TQ):
                    self._use_frames(frame)
                else:
                    self._use_up(ref)
                if self._packer.is_full:
                    yield self._take()
        self._judge(is_end=True)
        if not self._packer.is_empty:
            yield self._take()

    @property
    def num_read(self) -> int:
        """Clips read so far, skipped ones among them."""
        return self._counts["read"]

    def empty_batch(self) -> Batch:
        """Return a batch of padding, for a rank that has run out of clips while others have not."""
        assert self._packer.is_empty
        return self._packer.take()

    def state_dict(self) -> dict[str, Any]:
        """Return the positions of all ranks, the same on every rank: a collective."""
        assert isinstance(self._order, ShuffledOrder)
        ranks = gather(
            {
                "rank": self._dp_rank,
                "position": self._order.position.to_json(),
                "counts": self._counts,
                "frames": self._num_frames,
            }
        )
        by_rank = {rank["rank"]: rank for rank in ranks}  # tensor-parallel ranks share a position
        state = {
            "ranks": [by_rank[rank]["position"] for rank in sorted(by_rank)],
            "counts": sum((Counter(rank["counts"]) for rank in by_rank.values()), Counter()),
            "frames": sum(rank["frames"] for rank in by_rank.values()),
            "of": self._order.fingerprint,
        }
        # One JSON string, because a checkpoint loads only keys that exist beforehand.
        return {"position": json.dumps(state)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a position, saved by any number of ranks.

        Raises:
            UserError: it is a position in other data.
        """
        if not state_dict:
            return
        assert isinstance(self._order, ShuffledOrder)
        state = json.loads(state_dict["position"])
        remedy = "set it as before, or restart the data with --checkpoint.exclude_from_loading dataloader"
        what = f"the checkpoint's position in '{self.dataset}'"
        require_same(state["of"], self._order.fingerprint, what, remedy)
        positions = reshard([Position.from_json(position) for position in state["ranks"]], self._dp_world_size)
        self._order.position = positions[self._dp_rank]
        if self._dp_rank == 0:  # goes on from the sum of all
            self._counts, self._num_frames = Counter(state["counts"]), state["frames"]
        else:
            self._counts, self._num_frames = Counter(), 0

    def _take(self) -> Batch:
        counts, meter = self._counts, self._meter
        self._num_frames += self._packer.num_frames
        meter.num_clips, meter.num_frames = counts["read"] - counts["skipped"], self._num_frames
        return self._packer.take()

    def _clips(self) -> Iterator[tuple[ClipRef, CodedClip | SkippedClip]]:
        stream = ClipStream(self._readers, self._order, self._chunk_size)
        for refs, clips in map(self._encode, stream.load(**self._workers)):
            yield from zip(refs, clips, strict=True)

    def _encode(self, chunk: Chunk) -> tuple[list[ClipRef], list[CodedClip | SkippedClip]]:
        """Encode the audio of a chunk. The samples, which are large, are not kept."""
        codes: Iterator[torch.Tensor] = iter(())
        if waveforms := [clip.samples_S for clip in chunk.clips if isinstance(clip, AudioClip)]:
            assert self._codec is not None
            start = time.perf_counter()
            codes = iter(self._codec.encode_many(waveforms))
            self._meter.codec_seconds += time.perf_counter() - start
        clips = [
            CodedClip(clip.name, next(codes).numpy(), 0.0, clip.is_cut, clip.text, audio_warnings=clip.audio_warnings)
            if isinstance(clip, AudioClip)
            else clip
            for clip in chunk.clips
        ]
        return chunk.refs, clips

    def _deep_frames(self, ref: ClipRef, num_frames: int) -> np.ndarray | None:
        """Which frames, and whether the end, train the depth decoder: others in each epoch, the same on any ranks."""
        if self._depth_share == 1:
            return None
        assert isinstance(self._order, ShuffledOrder)
        key = (self._order.seed, ref.corpus, ref.window, ref.group, ref.row)
        return np.random.default_rng(key).random(num_frames + 1) < self._depth_share

    def _use_up(self, ref: ClipRef) -> None:
        if isinstance(self._order, ShuffledOrder):
            taken = self._order.take()
            assert dataclasses.replace(taken, frame=0) == dataclasses.replace(ref, frame=0), "the stream left its order"

    def _use_frames(self, frames: int) -> None:
        if isinstance(self._order, ShuffledOrder):
            self._order.use_frames(frames)

    def _count(self, ref: ClipRef, clip: CodedClip | SkippedClip) -> None:
        """Count a clip, and name it if it is skipped."""
        if ref.frame:  # counted when its beginning was read
            return
        counts = self._counts
        counts["read"] += 1
        if isinstance(clip, CodedClip):
            counts["cut at max_audio_seconds"] += clip.is_cut
            for warning in clip.audio_warnings:
                counts[warning] += 1
                if counts[warning] <= MAX_NAMED_CLIPS:
                    logger.warning(f"clip '{clip.name}': {warning}")
        if counts["read"] % CLIPS_PER_REPORT == 0:
            self._report()
        if isinstance(clip, SkippedClip):
            counts["skipped"] += 1
            counts[f"skipped: {clip.reason}"] += 1
            if counts["skipped"] <= MAX_NAMED_CLIPS:
                logger.warning(f"skipped clip {counts['skipped']} ({clip.reason}): {clip.message}")
        is_end = counts["read"] % self._num_clips == 0  # of an epoch, where one rank reads all clips
        if is_end or isinstance(clip, SkippedClip):
            self._judge(is_end=is_end)

    def _judge(self, *, is_end: bool) -> None:
        """Raise a UserError where more than the allowed fraction of the clips is bad, or all are."""
        counts = self._counts
        read, skipped = counts["read"], counts["skipped"]
        reasons = ", ".join(f"{n} {key[9:]}" for key, n in counts.items() if key.startswith("skipped: "))
        if skipped == read and skipped >= min(MIN_CLIPS_FOR_SHARE, self._num_clips):
            raise UserError(
                f"none of the first {read} clips of '{self.dataset}' that this rank read can be used ({reasons}); "
                "repair the corpus"
            )
        if is_too_many(skipped, read, self._max_bad_share, is_end=is_end, is_whole=self._dp_world_size == 1):
            raise UserError(
                f"{skipped} of {read} clips could not be used ({reasons}), more than data.max_skip_fraction = "
                f"{self._max_bad_share:g}; repair the corpus or raise data.max_skip_fraction"
            )

    def _report(self) -> None:
        counts = {
            **self._counts,
            "cut at seq_len": self._packer.num_cut,
            "going on in the next row": self._packer.num_split,
        }
        logger.info("clips: " + ", ".join(f"{number:,} {what}" for what, number in counts.items()))
