"""What a training step costs, in one table: this trainer, a plain loop, and TorchTitan's own Llama 3 of the same size.

    uv run python scripts/benchmarks/bench_train.py                          # CPU: tiny and mid
    uv run python scripts/benchmarks/bench_train.py --shapes 1B 8B           # one GPU
    uv run python scripts/benchmarks/bench_train.py --shapes 1B --profile outputs/profile.txt

Every way trains on the same clips of random codes, simulated lengths, in a process of its own, all ways in turn,
--repeats times. The plain loop (in training_ways.py only) is `LlamaForCausalLM`, one clip a row, padding with its mask
as a tokenizer gives it (and without, which a decoder could do), logits of everything, AdamW. No way checkpoints
activations. A useful token is one that enters the loss. FLOPs are 6 a multiplied weight and useful token, and attention
over a whole row; on a CPU MFU is the share of what a large matrix product reaches there.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import training_ways
from measuring import DEVICE, device_name, machine, measured, median_and_range
from training_ways import LOSS_POSITIONS, OURS, PLAIN, SHAPES, STOCK, UNMASKED

from llama_mimi.common.command_line import run_command
from llama_mimi.common.errors import UserError
from llama_mimi.training.metrics import peak_flops

AUDIO = "--model.vocabulary audio"
PADDED = "--data.packing pad"
COMPILED = "--compile.enable"
FLOAT8 = f"{COMPILED} --model.converters quantize.linear.float8 --quantize.linear.float8.filter_fqns output"
# Rows of the table: way and flags. Packed rows are not compiled on CPUs.
CPU_ROWS = [(PLAIN, ""), (UNMASKED, ""), (STOCK, ""), (OURS, PADDED), (OURS, ""), (OURS, AUDIO)]
GPU_ROWS = [
    (PLAIN, ""),
    (UNMASKED, ""),
    (STOCK, COMPILED),
    (OURS, f"{PADDED} {COMPILED}"),
    (OURS, ""),
    (OURS, COMPILED),
    (OURS, f"{COMPILED} {AUDIO}"),
    (OURS, FLOAT8),
]
DEFAULT_FLAGS = {"cpu": "", "cuda": COMPILED}[DEVICE]  # this trainer's, whose figures the last line gives


def bench_train(
    shapes: tuple[Literal["tiny", "mid", "1B", "8B"], ...] = ("tiny", "mid") if DEVICE == "cpu" else ("1B",),
    repeats: int = 5,
    num_threads: int = os.cpu_count() or 1,
    profile: Path | None = None,
) -> None:
    """Measure all ways to train at each shape.

    Args:
        profile: write where the time of this trainer's steps goes
    """
    if not shapes:
        raise UserError(f"no shape is named; give some of {', '.join(SHAPES)} as --shapes")
    torch.set_num_threads(num_threads)
    reference_flops = peak_flops(device_name()) if DEVICE == "cuda" else matmul_flops()
    if reference_flops is None:
        raise UserError(
            f"the peak of '{device_name()}' is not known; add it to PEAK_FLOPS of llama_mimi.training.metrics"
        )
    print(machine())
    print(f"100 % MFU is {reference_flops / 1e12:.3f} TFLOP/s\n")
    print("| shape | way | useful tokens/s | times the plain loop | MFU | peak memory | useful tokens |")
    print("|---|---|---|---|---|---|---|", flush=True)
    results = []
    for shape in shapes:
        with tempfile.TemporaryDirectory() as folder:
            results.append(rows_of(shape, Path(folder), repeats, profile, reference_flops))
    loss_memory()
    compared = [result for result in results if result["ratio_to_plain_loop"]] or results
    print(json.dumps({"device": device_name(), **compared[-1], "all": results}))


def rows_of(shape: str, folder: Path, repeats: int, profile: Path | None, reference_flops: float) -> dict[str, Any]:
    """Measure and print the rows of a shape; returns what the last line says of it."""
    training_ways.write_stand_ins(shape, folder)
    rows = CPU_ROWS if DEVICE == "cpu" else GPU_ROWS
    job = {"shape": shape, "folder": folder, "num_layers": SHAPES[shape].args.n_layers}
    if shape == "8B":  # all layers and the optimizer's states are 160 GB
        rows = [(OURS, COMPILED)]
        job["num_layers"] = most_layers(job)
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {row: [] for row in rows}
    for _ in range(repeats):
        for way, options in rows:
            run = worker(training_ways.measure, **job, way=way, options=options)
            runs[way, options] += [run] if run else []
    medians = {row: statistics.median(run["useful_tokens_per_s"] for run in own) for row, own in runs.items() if own}
    plain = medians.get((PLAIN, ""))
    for (way, options), own in runs.items():
        if not own:
            print(f"| {shape}, {job['num_layers']} layers | {way} `{options}` | none: see above | | | | |", flush=True)
            continue
        rates = [run["useful_tokens_per_s"] for run in own]
        median = medians[way, options]
        times = f"{median / plain:.2f}" if plain else ""
        mfu = own[0]["flops_per_token"] * median / reference_flops
        memory = max(run["peak_memory_bytes"] for run in own)
        print(
            f"| {shape}, {job['num_layers']} layers | {way} `{options}` | {median_and_range(rates)} | {times} | "
            f"{100 * mfu:.1f} % | {memory / 1e9:.2f} GB | {100 * own[0]['useful_share']:.0f} % |".replace(" ``", ""),
            flush=True,
        )
    if profile:
        path = profile.with_stem(f"{profile.stem}-{shape}")
        worker(training_ways.measure, **job, way=OURS, options=DEFAULT_FLAGS, profile=path)
    ours = runs[OURS, DEFAULT_FLAGS]
    if not ours:
        raise UserError(f"this trainer did not run at the shape {shape}; see above")
    rate = medians[OURS, DEFAULT_FLAGS]
    return {
        "shape": shape,
        "num_layers": job["num_layers"],
        # With all layers, at the same share of the peak; fewer are trained where all do not fit.
        "useful_tokens_per_s_of_all_layers": rate
        * ours[0]["flops_per_token"]
        / ours[0]["flops_per_token_of_all_layers"],
        "useful_tokens_per_s": rate,
        "plain_loop_useful_tokens_per_s": plain,
        "ratio_to_plain_loop": rate / plain if plain else None,
        "mfu": ours[0]["flops_per_token"] * rate / reference_flops,
        "peak_memory_bytes": max(run["peak_memory_bytes"] for run in ours),
    }


def most_layers(job: dict[str, Any]) -> int:
    for num_layers in range(SHAPES["8B"].args.n_layers, 0, -2):
        if worker(training_ways.measure, **job | {"num_layers": num_layers}, way=OURS, options=COMPILED):
            return num_layers
    raise UserError("not even two layers of the 8B shape fit into this GPU's memory")


def worker(function: Callable[..., Any], **job: Any) -> Any:
    """One measurement in a process of its own; None, and why on standard error, if it failed."""
    found, done = measured(function, **job)
    outcome = found or f"failed: {done.stderr[-2000:] if done.returncode else 'out of memory'}"
    print(json.dumps(job, default=str), outcome, file=sys.stderr, flush=True)  # what was measured is not lost
    return found


def loss_memory() -> None:
    """Print what the loss alone takes, forward and backward, at the width and vocabulary of the 1B model."""
    for way in ("in chunks", "full logits"):
        run = worker(training_ways.measure_loss, way=way)
        held = f"{run['bytes'] / 1e9:.2f} GB more at the peak" if run else "out of memory"
        print(f"\nloss of {LOSS_POSITIONS:,} positions, {way}: {held}")


def matmul_flops() -> float:
    """FLOP/s of a float32 matrix product on this CPU, the best of ten."""
    a, b = torch.randn(2, 2048, 2048)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(times)


if __name__ == "__main__":
    run_command(bench_train, __doc__)
