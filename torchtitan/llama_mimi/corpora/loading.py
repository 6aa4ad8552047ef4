"""What tokenisation and training share: reading in workers, encoding, and the limit on skipped clips."""

import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import Generator
from torch.utils.data import DataLoader, IterableDataset

from llama_mimi.audio.mimi import MimiCodec
from llama_mimi.common.distributed import end_with_parent
from llama_mimi.common.errors import UserError
from llama_mimi.corpora.clips import AudioClip, SkippedClip
from llama_mimi.corpora.code_shards import CodedClip

MIN_JUDGED_CLIPS = 100  # clips that are read before the fraction of skipped ones is judged
MAX_NAMED_CLIPS = 20  # skipped clips that are named one by one; all are counted


class _WithErrors(IterableDataset):
    """A dataset whose `UserError` is its last item: an exception of a worker would arrive with its traceback."""

    def __init__(self, dataset: Iterable[Any]) -> None:
        self._dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self._dataset
        except UserError as error:
            yield UserError(str(error))


def read_in_workers(dataset: Iterable[Any], **workers: Any) -> Iterator[Any]:
    """Yield the items of a dataset, read in worker processes; ``workers`` are arguments of PyTorch's DataLoader.

    Raises:
        UserError: the dataset raised it, in whichever process.
    """
    # PyTorch draws a seed for the workers, which must not advance the generator of training.
    options: dict[str, Any] = {"batch_size": None, "collate_fn": _unchanged, "generator": Generator(), **workers}
    for item in DataLoader(_WithErrors(dataset), worker_init_fn=partial(_end_with, os.getpid()), **options):
        if isinstance(item, UserError):
            raise item
        yield item


def _unchanged(item: Any) -> Any:
    return item


def _end_with(parent: int, worker: int) -> None:
    """End a worker with the process that reads from it, even if that is killed; it would wait for ever to send."""
    end_with_parent()
    if os.getppid() != parent:  # the parent was killed before
        os._exit(1)


def encode_clips(
    codec: MimiCodec, clips: Sequence[AudioClip | CodedClip | SkippedClip]
) -> tuple[list[CodedClip | SkippedClip], float]:
    """Return the clips with codes in place of audio, and the seconds that encoding took."""
    start = time.perf_counter()
    codes = iter(codec.encode_many([clip.samples_S for clip in clips if isinstance(clip, AudioClip)]))
    encoded: list[CodedClip | SkippedClip] = []
    for clip in clips:
        if isinstance(clip, AudioClip):
            codes_TQ, seconds = next(codes).numpy().astype(np.uint16), len(clip.samples_S) / codec.sample_rate_hz
            labels = clip.text, clip.speaker, clip.audio_warnings, clip.audio_hash
            encoded.append(CodedClip(clip.name, codes_TQ, seconds, clip.is_cut, *labels))
        else:
            encoded.append(clip)
    return encoded, time.perf_counter() - start


def is_too_many(num_skipped: int, num_read: int, max_skip_fraction: float, *, is_whole: bool, is_end: bool) -> bool:
    """Return True if more than the allowed fraction of the clips was skipped.

    Clips before the end, or of one rank of several, are a sample of the corpus: they may exceed the allowed number by
    three standard deviations and one. Fewer than `MIN_JUDGED_CLIPS` clips are judged only at the end, where they
    count as that many, or if no clip may be skipped.

    Args:
        is_whole: this process reads the whole corpus.
        is_end: there are no more clips.
    """
    allowed = max_skip_fraction * max(num_read, MIN_JUDGED_CLIPS)
    if not (is_end and is_whole) and max_skip_fraction:
        allowed += 3 * math.sqrt(allowed) + 1
    return (is_end or num_read >= MIN_JUDGED_CLIPS or not max_skip_fraction) and num_skipped > allowed
