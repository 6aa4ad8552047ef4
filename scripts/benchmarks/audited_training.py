"""Train on one rank of torchrun, and record which frames each step uses. kill_runs.py reads this record.

Each step appends a line of JSON to ``$AUDIT-<rank>.jsonl``: the number of the step, and the numbers of its frames.
"""

import json
import os
from collections.abc import Iterator
from typing import Any

from llama_mimi.trainer import Trainer  # first: it chooses the device before anything imports TorchTitan

# isort: split
import numpy as np

from llama_mimi import train

train_step = Trainer.train_step


def frame_numbers(codes_TQ: np.ndarray) -> list[int]:
    """Return frame numbers. The codes of a frame are the base-256 digits of its number; level 0 is the last digit."""
    return (codes_TQ.astype(np.int64) @ 256 ** np.arange(codes_TQ.shape[1])).tolist()


def audited_step(self: Trainer, data_iterator: Iterator[Any]) -> None:
    """Train one step, and record the numbers of the frames in its labels."""
    vocabulary, frames = self.tokenizer.vocabulary, []

    def batches() -> Iterator[Any]:
        for inputs, labels_BL in data_iterator:
            codes_N = vocabulary.entries(labels_BL[vocabulary.is_audio(labels_BL)]).numpy()
            frames.extend(frame_numbers(codes_N.reshape(-1, vocabulary.num_quantizers)))
            yield inputs, labels_BL

    train_step(self, batches())
    print(json.dumps({"step": self.step, "frames": frames}), file=audit, flush=True)


if __name__ == "__main__":
    Trainer.train_step = audited_step
    with open(f"{os.environ['AUDIT']}-{os.environ['RANK']}.jsonl", "w") as audit:
        train.main()
