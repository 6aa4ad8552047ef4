"""Dataloader: workers read clips; the training process encodes audio and packs tokens into batches."""

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from pydantic import TypeAdapter
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.tools.logging import logger

from llama_mimi.audio.mimi import MimiCodec
from llama_mimi.common.distributed import gather
from llama_mimi.common.errors import UserError
from llama_mimi.common.resume import require_same
from llama_mimi.corpora.clips import MAX_NAMED_CLIPS, MIN_JUDGED_CLIPS, SkippedClip, is_too_many, read_in_workers
from llama_mimi.corpora.code_shards import encode_clips
from llama_mimi.data.examples import Encoded, ExampleBuilder
from llama_mimi.data.order import ClipRef, Position, RowsInOrder, ShuffledOrder, Stream, reshard
from llama_mimi.data.packing import BatchPacker
from llama_mimi.tokens.tokenizer import IGNORE_INDEX, Batch

CLIPS_PER_REPORT = 1000
MIN_CHUNK = 8  # minimum number of clips that a worker reads, and the codec encodes, at once

ClipOrder = ShuffledOrder | RowsInOrder


def read_chunks(
    streams: Sequence[Stream], order: ClipOrder, chunk_size: int, worker: int, num_workers: int
) -> Iterator[list[tuple[ClipRef, Any]]]:
    """Yield every n-th chunk for one of n workers. A chunk is a list of consecutive pairs (position, clip).

    A worker reads all units that contain rows of its chunks; these are often all units of a window. So the decoding of
    audio is divided among the workers, but each worker reads most of the files.
    """
    units: dict[tuple[int, int, int], Sequence[Any]] = {}  # rows of the current window of each stream
    refs = iter(order)
    chunks = iter(lambda: list(islice(refs, chunk_size)), [])
    for chunk in islice(chunks, worker, None, num_workers):
        clips: list[tuple[ClipRef, Any]] = []
        for ref in chunk:
            reader, key = streams[ref.stream].reader, ref[:3]
            if key not in units:
                units = {k: rows for k, rows in units.items() if k[0] != ref.stream or k[1] == ref.window}
                units[key] = reader.read(ref.unit)
            clips += [(ref, clip) for clip in reader.clips(units[key][ref.row])]
        yield clips


@dataclass
class DataMeter:
    """Counts for the metrics. After a resume, rank 0 begins with the sums over all ranks."""

    codec_seconds: float = 0.0  # time spent encoding since the last reset
    num_clips: int = 0  # clips in the batches so far
    num_frames: int = 0  # frames in the batches so far


@dataclass(eq=False)
class SpeechDataLoader(BaseDataLoader):
    """Dataloader of token ids: endless with a `ShuffledOrder`, one pass with `RowsInOrder`."""

    streams: Sequence[Stream]
    order: ClipOrder
    packer: BatchPacker
    codec: MimiCodec | None = None  # None if all corpora are tokenised
    _: KW_ONLY
    tasks: Sequence[str] = ("audio",)  # all tasks of the run
    workers: Mapping[str, Any]  # arguments of PyTorch's DataLoader
    max_skip_fraction: float = 0.0  # allowed fraction of unusable clips
    depth_train_fraction: float = 1.0  # fraction of frames that train the depth decoder (hierarchical model)
    meter: DataMeter = field(default_factory=DataMeter)

    def __post_init__(self) -> None:
        self.counts: Counter[str] = Counter()  # clips read, cut, and skipped or filtered by reason
        self.num_clips = sum(int(stream.reader.rows_per_unit.sum()) for stream in self.streams)
        self.meter.num_clips = self.meter.num_frames = 0
        self._builder = ExampleBuilder(self.packer.tokenizer)
        self.dataset = ", ".join(dict.fromkeys(stream.reader.name for stream in self.streams))

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches; the last batch is padded. Raise a `UserError` if too many clips are unusable."""
        packer = self.packer
        for ref, clip in self._clips():
            task = self.streams[ref.stream].task
            if not isinstance(clip, SkippedClip):
                example = self._builder.build(task, clip, starts_with_text=(ref.window + ref.row) % 2 == 0)
                is_too_long = task == "asr" and clip.is_cut
                why = "its audio is cut, but not its text" if is_too_long else packer.no_room(example)
                if why is not None:
                    clip = SkippedClip("too long", f"'{clip.name}' cannot be used: {why}", is_filtered=True)
            if not ref.start:  # a clip is counted once, with its first frame
                self._count(clip)
            num_units = 0 if isinstance(clip, SkippedClip) else len(example.ends_U)
            if ref.start >= num_units:  # also if max_audio_seconds was lowered
                self._advance(ref)
                continue
            self._train_some_frames(ref, example.labels_NW)
            unit = ref.start
            while unit < num_units:
                begun, unit = unit, packer.add(example, unit, self.tasks.index(task))
                self._advance(ref, unit if unit < num_units else None)
                if packer.is_full or unit == begun:
                    yield self._next_batch()
        self._judge(is_end=True)
        if packer.num_used:
            yield self._next_batch()

    def state_dict(self) -> dict[str, Any]:
        """Return the positions of all ranks after their last batches. All ranks must call this collective operation."""
        assert isinstance(self.order, ShuffledOrder)
        own = dataclasses.asdict(self.order.position), self.counts, self.meter.num_frames
        of_ranks = dict(gather((self.order.dp_rank, own)))  # tensor-parallel ranks share a position
        ranks, counts, frames = zip(*(of_ranks[rank] for rank in sorted(of_ranks)), strict=True)
        state = {"ranks": ranks, "counts": sum(counts, Counter()), "frames": sum(frames), "of": self.order.fingerprint}
        # One JSON string, because DCP loads only keys that exist in the state before loading.
        return {"position": json.dumps(state)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the positions that any number of ranks saved; raise a `UserError` if the data have changed."""
        if not state_dict:
            return
        assert isinstance(self.order, ShuffledOrder)
        state = json.loads(state_dict["position"])
        remedy = "restore the earlier data, or start a new epoch with --checkpoint.exclude_from_loading dataloader"
        require_same(state["of"], self.order.fingerprint, f"the checkpoint's position in '{self.dataset}'", remedy)
        positions = reshard(TypeAdapter(list[Position]).validate_python(state["ranks"]), self.order.dp_world_size)
        self.order.position = positions[self.order.dp_rank]
        if self.order.dp_rank == 0:
            self.counts, self.meter.num_frames = Counter(state["counts"]), state["frames"]

    def _clips(self) -> Iterator[tuple[ClipRef, Any]]:
        """Yield the clips as codes (or texts, or utterances), with their positions."""
        read = partial(read_chunks, self.streams, self.order, max(self.packer.batch_size, MIN_CHUNK))
        for chunk in read_in_workers(read, **self.workers):
            refs, clips = [ref for ref, _ in chunk], [clip for _, clip in chunk]
            if self.codec is not None:
                start = time.perf_counter()
                clips = encode_clips(self.codec, clips)
                self.meter.codec_seconds += time.perf_counter() - start
            yield from zip(refs, clips, strict=True)

    def _train_some_frames(self, ref: ClipRef, labels_NW: np.ndarray) -> None:
        """Draw the frames (and ends) that train the depth decoder, and remove the other labels of levels 1 to Q - 1."""
        if self.depth_train_fraction == 1:
            return
        assert isinstance(self.order, ShuffledOrder)
        rows_N = (labels_NW[:, 1] != IGNORE_INDEX).nonzero()[0]
        generator = np.random.default_rng((self.order.seed, *ref[:4]))
        labels_NW[rows_N[generator.random(len(rows_N)) >= self.depth_train_fraction], 1:] = IGNORE_INDEX

    def _advance(self, ref: ClipRef, unit: int | None = None) -> None:
        """Move the position to ``unit`` of this clip, or to the next clip if ``unit`` is None."""
        if isinstance(self.order, ShuffledOrder):
            if unit is not None:
                self.order.use_frames(unit)
            else:
                assert self.order.next_clip()[:4] == ref[:4], "the clips are not in order"

    def _next_batch(self) -> Batch:
        self.meter.num_clips = self.counts["read"] - self.counts["skipped"] - self.counts["filtered"]
        self.meter.num_frames += self.packer.num_frames
        return self.packer.pop()

    def _count(self, clip: Encoded | SkippedClip) -> None:
        """Count a clip, and log its name if it is skipped or has warnings."""
        counts = self.counts
        counts["read"] += 1
        if isinstance(clip, SkippedClip):
            kind = "filtered" if clip.is_filtered else "skipped"
            counts[kind] += 1
            notes = {f"{kind}: {clip.reason}": clip.message}
        else:
            counts["cut at max_audio_seconds"] += clip.is_cut
            notes = dict.fromkeys(clip.audio_warnings, f"'{clip.name}'")
        for note, message in notes.items():
            counts[note] += 1
            if counts[note] <= MAX_NAMED_CLIPS:
                logger.warning(f"clip {counts['read']} {note}: {message}")
        if counts["read"] % CLIPS_PER_REPORT == 0:
            numbers = {**counts, "cut at seq_len": self.packer.num_cut}
            logger.info("clips: " + ", ".join(f"{number:,} {what}" for what, number in numbers.items()))
        is_end = counts["read"] % self.num_clips == 0  # end of an epoch, if one rank reads all clips
        if is_end or isinstance(clip, SkippedClip):
            self._judge(is_end=is_end)

    def _judge(self, *, is_end: bool) -> None:
        """Raise a `UserError` if all clips are unusable, or if more clips are unusable than allowed."""
        read, skipped, filtered = (self.counts[key] for key in ("read", "skipped", "filtered"))
        is_none = skipped + filtered == read >= min(MIN_JUDGED_CLIPS, self.num_clips)
        is_whole, limit = self.order.dp_world_size == 1, self.max_skip_fraction
        if is_none or is_too_many(skipped, read, limit, is_end=is_end, is_whole=is_whole):
            kinds = ("skipped: ", "filtered: ") if is_none else ("skipped: ",)
            found = {key: n for key, n in self.counts.items() if key.startswith(kinds)}
            reasons = ", ".join(f"{n} {key.partition(': ')[2]}" for key, n in found.items())
            problem = f"{sum(found.values())} of {read} clips of '{self.dataset}' could not be used ({reasons})"
            remedy = "repair or remove these clips" + ", or raise data.max_skip_fraction" * (limit < 1)
            raise UserError(f"{problem}, and data.max_skip_fraction is {limit:g}; {remedy}")
