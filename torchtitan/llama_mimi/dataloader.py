"""TorchTitan's dataloader seam: audio is read in workers, Mimi runs here in batches on the training device.

A source of pre-computed codes takes the place of `ClipStream` and `MimiCodec`; everything after the codes stays.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torchtitan.components.dataloader import BaseDataLoader, ParallelAwareDataloader
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import device_type

from llama_mimi.clips import ClipBatch, ClipStream
from llama_mimi.codec import DTYPES, MimiCodec
from llama_mimi.corpora import open_corpus
from llama_mimi.errors import UserError
from llama_mimi.sequences import SequenceBuilder

# A share is judged on at least this many clips: one bad clip among the first ten is no 10 %.
MIN_CLIPS_FOR_SHARE = 100
# Every skipped clip is counted; only so many are named one by one.
MAX_NAMED_CLIPS = 20
# How often the counts are logged.
CLIPS_PER_REPORT = 1000


class UnitDataLoader(BaseDataLoader):
    """Batches of token ids from batches of clips.

    Args:
        clips: loader of `ClipBatch`.
        codec: turns samples into codes, on the training device.
        sequences: turns codes into ids.
        dataset: its name, for messages.
        seq_len: L of the batches.
        max_bad_share: raise when a larger share of the clips cannot be used.
    """

    def __init__(
        self,
        clips: ParallelAwareDataloader,
        codec: MimiCodec,
        sequences: SequenceBuilder,
        *,
        dataset: str,
        seq_len: int,
        max_bad_share: float,
    ) -> None:
        self._clips, self._codec, self._sequences = clips, codec, sequences
        self._dataset = dataset
        self._seq_len, self._max_bad_share = seq_len, max_bad_share
        self._counts_key = f"counts_dp_rank_{clips.dp_rank}"
        self._counts: Counter[str] = Counter()  # clips read, cut, and skipped by reason

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        for batch in self._clips:
            self._count(batch)
            if not batch.clips:
                raise UserError(
                    f"none of the {len(batch.skipped)} clips of '{self._dataset}' that this rank reads can be used; "
                    "repair the corpus, or use fewer ranks than it has clips"
                )
            inputs_BL, labels_BL = self._tokens(batch)
            yield {"input": inputs_BL}, labels_BL

    def empty_batch(self) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """A batch of padding, for a rank that has run out of clips while others have not."""
        inputs_BL, labels_BL = self._sequences.pad_batch([torch.empty(0, dtype=torch.long)], self._seq_len)
        return {"input": inputs_BL}, labels_BL

    def state_dict(self) -> dict[str, Any]:
        # One JSON string, because a checkpoint loads only keys that exist beforehand and reasons come and go.
        return {**self._clips.state_dict(), self._counts_key: json.dumps(self._counts)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:
            self._clips.load_state_dict(state_dict)
            self._counts = Counter(json.loads(state_dict[self._counts_key]))

    def _tokens(self, batch: ClipBatch) -> tuple[torch.Tensor, torch.Tensor]:
        codes = self._codec.encode([clip.samples_S for clip in batch.clips])
        sequences = [
            self._sequences.sequence(codes_TQ, is_cut=clip.is_cut, text=clip.text)
            for clip, codes_TQ in zip(batch.clips, codes, strict=True)
        ]
        self._counts["cut at seq_len"] += sum(len(ids_L) > self._seq_len + 1 for ids_L in sequences)
        return self._sequences.pad_batch(sequences, self._seq_len)

    def _count(self, batch: ClipBatch) -> None:
        """Count and name what was skipped.

        Raises:
            UserError: more than the allowed share is bad.
        """
        read_before = self._counts["read"]
        self._counts["read"] += len(batch.clips) + len(batch.skipped)
        self._counts["cut at max_audio_seconds"] += sum(clip.is_cut for clip in batch.clips)
        for clip in batch.skipped:
            self._counts["skipped"] += 1
            self._counts[f"skipped: {clip.reason}"] += 1
            if self._counts["skipped"] <= MAX_NAMED_CLIPS:
                logger.warning(f"skipped clip {self._counts['skipped']} ({clip.reason}): {clip.message}")
        if self._counts["read"] // CLIPS_PER_REPORT > read_before // CLIPS_PER_REPORT:
            logger.info("clips: " + ", ".join(f"{number:,} {what}" for what, number in self._counts.items()))
        read, skipped = self._counts["read"], self._counts["skipped"]
        if skipped > self._max_bad_share * max(read, MIN_CLIPS_FOR_SHARE):
            reasons = ", ".join(f"{n} {key[9:]}" for key, n in self._counts.items() if key.startswith("skipped: "))
            raise UserError(
                f"{skipped} of {read} clips could not be used ({reasons}), more than data.max_bad_share = "
                f"{self._max_bad_share:g}; repair the corpus or raise data.max_bad_share"
            )


def build_dataloader(dp_world_size: int, dp_rank: int, tokenizer: SequenceBuilder, job_config: Any) -> UnitDataLoader:
    """The training loader: endless and shuffled by ``debug.seed`` (0 if unset)."""
    training = job_config.training
    return _build(
        job_config,
        tokenizer,
        training,
        dp_rank=dp_rank,
        dp_world_size=dp_world_size,
        seed=job_config.debug.seed or 0,
        is_endless=True,
    )


def build_validation_dataloader(
    dp_world_size: int, dp_rank: int, tokenizer: SequenceBuilder, job_config: Any
) -> UnitDataLoader:
    """The held-out corpus once, in its own order."""
    return _build(
        job_config,
        tokenizer,
        job_config.validation,
        dp_rank=dp_rank,
        dp_world_size=dp_world_size,
        seed=None,
        is_endless=False,
    )


def _build(
    job_config: Any,
    sequences: SequenceBuilder,
    split: Any,
    *,
    dp_rank: int,
    dp_world_size: int,
    seed: int | None,
    is_endless: bool,
) -> UnitDataLoader:
    """``split`` is ``[training]`` or ``[validation]``: dataset, batch size, seq_len and workers."""
    data, codec_config = job_config.data, job_config.codec
    codec = MimiCodec(
        codec_config.name, codec_config.num_quantizers, torch.device(device_type), DTYPES[codec_config.dtype]
    )
    text_column = data.text_column if data.task == "tts" else None
    stream = ClipStream(
        open_corpus(split.dataset, split.dataset_path, data.audio_column, text_column),
        batch_size=split.local_batch_size,
        dp_rank=dp_rank,
        dp_world_size=dp_world_size,
        sample_rate_hz=codec.sample_rate_hz,
        frame_size=codec.frame_size,
        max_seconds=data.max_audio_seconds,
        seed=seed,
        shuffle_block=data.shuffle_block,
        is_endless=is_endless,
    )
    workers = dataclasses.asdict(split.dataloader)
    if workers["num_workers"] > stream.max_workers:
        logger.warning(
            f"'{split.dataset}' has {stream.max_workers} shards a rank: {stream.max_workers} loader workers are used, "
            f"not {workers['num_workers']}"
        )
        workers["num_workers"] = stream.max_workers
    clips = ParallelAwareDataloader(stream, dp_rank, dp_world_size, batch_size=None, collate_fn=_unchanged, **workers)
    return UnitDataLoader(
        clips, codec, sequences, dataset=split.dataset, seq_len=split.seq_len, max_bad_share=data.max_bad_share
    )


def _unchanged(batch: ClipBatch) -> ClipBatch:
    return batch
