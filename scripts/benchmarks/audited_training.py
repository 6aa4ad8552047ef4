"""The trainer in a rank of torchrun, with the clips of every step written down for scripts/benchmarks/kill_runs.py.

Each step adds a line of JSON to ``$AUDIT-<rank>.jsonl``: its number, and [row group, row, first frame, end] of each
piece of a clip that its batches used.
"""

import json
import os
from collections.abc import Iterator
from typing import Any

from llama_mimi import train  # first: it decides on the device before anything imports TorchTitan

# isort: split
from torchtitan.train import Trainer

from llama_mimi.data.clip_readers import SkippedClip
from llama_mimi.corpora.code_shards import CodedClip
from llama_mimi.data.dataloader import SpeechDataLoader
from llama_mimi.data.order import ClipRef

clips, use_up, use_frames = SpeechDataLoader._clips, SpeechDataLoader._use_up, SpeechDataLoader._use_frames
train_step = Trainer.train_step
pieces: list[list[int]] = []
# The clip that is being put into batches: its row group, row, length, and the frames used so far.
clip_now: dict[str, int] = {}


def watched_clips(self: SpeechDataLoader) -> Iterator[tuple[ClipRef, CodedClip | SkippedClip]]:
    for ref, clip in clips(self):
        assert isinstance(clip, CodedClip), "the corpus has no bad clips"
        clip_now.update(group=ref.group, row=ref.row, length=len(clip.codes_TQ), used=ref.frame)
        yield ref, clip


def note(frames: int) -> None:
    if frames > clip_now["used"]:
        pieces.append([clip_now["group"], clip_now["row"], clip_now["used"], frames])
        clip_now["used"] = frames


def watched_use_up(self: SpeechDataLoader, ref: ClipRef) -> None:
    note(clip_now["length"])
    use_up(self, ref)


def watched_use_frames(self: SpeechDataLoader, frames: int) -> None:
    note(frames)
    use_frames(self, frames)


def watched_step(self: Trainer, data_iterator: Iterator[Any]) -> None:
    """A step, whose batches must hold what the loader says that it used."""
    num_audio_tokens = 0

    def watched_batches() -> Iterator[Any]:
        nonlocal num_audio_tokens
        for inputs, labels_BL in data_iterator:
            num_audio_tokens += int(self.tokenizer.vocabulary.is_audio(labels_BL).sum())
            yield inputs, labels_BL

    train_step(self, watched_batches())
    num_frames = sum(end - start for _, _, start, end in pieces)
    assert num_audio_tokens == num_frames * self.tokenizer.vocabulary.num_quantizers, "the batches hold other frames"
    print(json.dumps({"step": self.step, "pieces": pieces}), file=audit, flush=True)
    pieces.clear()


if __name__ == "__main__":
    SpeechDataLoader._clips = watched_clips  # type: ignore[method-assign]
    SpeechDataLoader._use_up = watched_use_up  # type: ignore[method-assign]
    SpeechDataLoader._use_frames = watched_use_frames  # type: ignore[method-assign]
    Trainer.train_step = watched_step
    with open(f"{os.environ['AUDIT']}-{os.environ['RANK']}.jsonl", "w") as audit:
        train.main()
