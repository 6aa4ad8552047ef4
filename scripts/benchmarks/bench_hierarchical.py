"""What a training step of the hierarchical arm costs, beside a plain loop over `CsmForConditionalGeneration`.

    uv run python scripts/benchmarks/bench_hierarchical.py

The same clips of random codes and simulated lengths, rows of as many frames, AdamW; each way in a process of its own,
all in turn, --repeats times. The plain loop (in training_ways.py) has one clip a row and the class's own loss.
"""

import os
import statistics
import tempfile
from pathlib import Path
from typing import Literal

import torch
import training_ways
from measuring import machine, measured, median_and_range
from training_ways import OURS, OURS_CSM, PLAIN_CSM, SHAPES

from llama_mimi.common.command_line import run_command
from llama_mimi.common.errors import UserError

ROWS = [
    (PLAIN_CSM, ""),
    (OURS_CSM, "--data.packing pad"),
    (OURS_CSM, ""),
    (OURS_CSM, "--model.depth_train_fraction 0.0625"),
    (OURS, ""),
]


def bench_hierarchical(
    shapes: tuple[Literal["tiny", "mid", "1B"], ...] = ("tiny", "mid"),
    repeats: int = 5,
    num_threads: int = os.cpu_count() or 1,
) -> None:
    """Measure all ways at each shape; frames are those that the backbone trains on."""
    torch.set_num_threads(num_threads)
    print(machine())
    print("| shape | way | frames/s | times the plain loop | MFLOPs a frame |")
    print("|---|---|---|---|---|", flush=True)
    for shape in shapes:
        with tempfile.TemporaryDirectory() as folder:
            training_ways.write_stand_ins(shape, Path(folder))
            job = {"shape": shape, "folder": folder, "num_layers": SHAPES[shape].args.n_layers}
            rates: dict[tuple[str, str], list[float]] = {row: [] for row in ROWS}
            flops: dict[tuple[str, str], float] = {}
            for _ in range(repeats):
                for way, options in ROWS:
                    found, done = measured(training_ways.measure, **job, way=way, options=options)
                    if not found:
                        raise UserError(f"'{way}' failed: {done.stderr[-600:]}")
                    share = 0.0625 if "depth_train_fraction" in options else 1
                    targets = 1 + 3 * share  # of a frame
                    rates[way, options].append(found["useful_tokens_per_s"] / targets)
                    flops[way, options] = found["flops_per_token"] * targets / 1e6
        plain = statistics.median(rates[PLAIN_CSM, ""])
        for (way, options), own in rates.items():
            times = f"{statistics.median(own) / plain:.2f}"
            name = f"{way} `{options}`" if options else way
            print(f"| {shape} | {name} | {median_and_range(own)} | {times} | {flops[way, options]:,.0f} |", flush=True)


if __name__ == "__main__":
    run_command(bench_hierarchical, __doc__)
