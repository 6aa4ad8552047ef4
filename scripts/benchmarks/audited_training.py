"""The trainer in a rank of torchrun, with a record of the clips of every step for scripts/benchmarks/kill_runs.py.

Each step adds a line of JSON to ``$AUDIT-<rank>.jsonl``: its number, and [unit, row, first frame, end] of each
piece of a clip in its batches.
"""

import json
import os
from collections.abc import Iterator
from typing import Any

from llama_mimi import train  # first: it decides on the device before anything imports TorchTitan

# isort: split
from torchtitan.train import Trainer

from llama_mimi.corpora.clips import SkippedClip
from llama_mimi.corpora.code_shards import CodedClip
from llama_mimi.data.dataloader import SpeechDataLoader
from llama_mimi.data.order import ClipRef

clips, advance = SpeechDataLoader._clips, SpeechDataLoader._advance
train_step = Trainer.train_step
pieces: list[list[int]] = []
current: dict[str, int] = {}  # unit, row and length of the clip in use, and its frames used so far


def audited_clips(self: SpeechDataLoader) -> Iterator[tuple[ClipRef, CodedClip | SkippedClip]]:
    for ref, clip in clips(self):
        assert isinstance(clip, CodedClip), "the corpus has no bad clips"
        current.update(unit=ref.unit, row=ref.row, length=len(clip.codes_TQ), used=ref.frame)
        yield ref, clip


def audited_advance(self: SpeechDataLoader, ref: ClipRef, frame: int | None = None) -> None:
    end = current["length"] if frame is None else frame
    if end > current["used"]:
        pieces.append([current["unit"], current["row"], current["used"], end])
        current["used"] = end
    advance(self, ref, frame)


def audited_step(self: Trainer, data_iterator: Iterator[Any]) -> None:
    """Take a step, check that its batches have the frames that the loader used, and write them down."""
    num_tokens = 0

    def batches() -> Iterator[Any]:
        nonlocal num_tokens
        for inputs, labels_BL in data_iterator:
            num_tokens += int(self.tokenizer.vocabulary.is_audio(labels_BL).sum())
            yield inputs, labels_BL

    train_step(self, batches())
    num_frames = sum(end - start for _, _, start, end in pieces)
    assert num_tokens == num_frames * self.tokenizer.vocabulary.num_quantizers, "the batches have other frames"
    print(json.dumps({"step": self.step, "pieces": pieces}), file=audit, flush=True)
    pieces.clear()


if __name__ == "__main__":
    for name, replacement in (("_clips", audited_clips), ("_advance", audited_advance)):
        setattr(SpeechDataLoader, name, replacement)
    Trainer.train_step = audited_step
    with open(f"{os.environ['AUDIT']}-{os.environ['RANK']}.jsonl", "w") as audit:
        train.main()
