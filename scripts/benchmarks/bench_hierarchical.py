"""Compare a training step of the hierarchical architecture with a plain loop over `CsmForConditionalGeneration`.

    uv run python scripts/benchmarks/bench_hierarchical.py

All methods train with AdamW on the same clips, in sequences of the same length. Clips have random codes and simulated
lengths. Each method runs in a new process, --repeats times. The methods alternate. In the plain loop, each sequence
contains one clip.
"""

import os
import statistics
import tempfile
from pathlib import Path
from typing import Literal

import torch
import training_methods
from measuring import machine, measure, median_and_range
from training_methods import OURS, OURS_CSM, PLAIN_CSM, SHAPES

from llama_mimi.common.command_line import run_command

SPARSE = "--model.depth_train_fraction 0.0625"
ROWS = [(PLAIN_CSM, ""), (OURS_CSM, "--data.packing pad"), (OURS_CSM, ""), (OURS_CSM, SPARSE), (OURS, "")]


def bench_hierarchical(
    shapes: tuple[Literal["tiny", "mid", "1B"], ...] = ("tiny", "mid"),
    repeats: int = 5,
    num_threads: int = os.cpu_count() or 1,
) -> None:
    """Measure all methods with each shape. Rates count the frames that train the backbone."""
    torch.set_num_threads(num_threads)
    print(machine())
    print("| shape | method | frames/s | times the plain loop | MFLOPs a frame |\n|---|---|---|---|---|", flush=True)
    for shape in shapes:
        with tempfile.TemporaryDirectory() as folder:
            training_methods.write_stand_ins(shape, Path(folder))
            job = {"shape": shape, "folder": folder, "num_layers": SHAPES[shape].args.n_layers}
            rates: dict[tuple[str, str], list[float]] = {row: [] for row in ROWS}
            flops: dict[tuple[str, str], float] = {}
            for _ in range(repeats):
                for method, flags in ROWS:
                    result = measure(training_methods.measure_training, **job, method=method, flags=flags)
                    targets = 1 + 3 * (0.0625 if flags == SPARSE else 1)  # targets per frame
                    rates[method, flags].append(result["useful_tokens_per_s"] / targets)
                    flops[method, flags] = result["flops_per_token"] * targets / 1e6
        plain = statistics.median(rates[PLAIN_CSM, ""])
        for (method, flags), own in rates.items():
            times, name = statistics.median(own) / plain, f"{method} `{flags}`".removesuffix(" ``")
            print(f"| {shape} | {name} | {median_and_range(own)} | {times:.2f} | {flops[method, flags]:,.0f} |")


if __name__ == "__main__":
    run_command(bench_hierarchical, __doc__)
