"""Measure the training steps of this trainer, of a plain loop, and of TorchTitan's own Llama 3 with the same size.

    uv run python scripts/benchmarks/bench_train.py                          # CPU: tiny and mid
    uv run python scripts/benchmarks/bench_train.py --shapes 1B 8B           # one GPU
    uv run python scripts/benchmarks/bench_train.py --shapes 1B --profile outputs/profile.txt

All methods train on the same clips, without activation checkpointing. Clips have random codes and simulated lengths.
Each method runs in a new process, --repeats times. The methods alternate. The plain loop trains `LlamaForCausalLM` with
AdamW. It pads each clip to the same length, and computes the logits of every position, with or without an attention
mask. A token is useful if it counts in the loss. The FLOPs per useful token are 6 for each weight of a matrix product,
plus the FLOPs of attention over a whole sequence. On a CPU, 100 % MFU is the speed of a large matrix product.
"""

import json
import os
import statistics
import sys
import tempfile
import timeit
from pathlib import Path
from typing import Any, Literal

import torch
import training_methods
from measuring import DEVICE, device_name, machine, measure, median_and_range
from training_methods import LOSS_POSITIONS, OURS, PLAIN, SHAPES, STOCK, UNMASKED

from llama_mimi.common.command_line import run_command
from llama_mimi.common.errors import UserError
from llama_mimi.training.metrics import peak_flops

AUDIO, PADDED, COMPILED = "--model.vocabulary audio", "--data.packing pad", "--compile.enable"
FLOAT8 = f"{COMPILED} --model.converters quantize.linear.float8 --quantize.linear.float8.filter_fqns output"
# Rows of the table: method and flags. On CPUs, packed rows are not compiled.
BASELINES = [(PLAIN, ""), (UNMASKED, "")]
CPU_ROWS = [*BASELINES, (STOCK, ""), (OURS, PADDED), (OURS, ""), (OURS, AUDIO)]
GPU_ROWS = [*BASELINES, (STOCK, COMPILED), (OURS, f"{PADDED} {COMPILED}"), (OURS, "")]
GPU_ROWS += [(OURS, COMPILED), (OURS, f"{COMPILED} {AUDIO}"), (OURS, FLOAT8)]
DEFAULT_FLAGS = {"cpu": "", "cuda": COMPILED}[DEVICE]  # flags of this trainer in the last line


def bench_train(
    shapes: tuple[Literal["tiny", "mid", "1B", "8B"], ...] = ("tiny", "mid") if DEVICE == "cpu" else ("1B",),
    repeats: int = 5,
    num_threads: int = os.cpu_count() or 1,
    profile: Path | None = None,
) -> None:
    """Measure all methods with each shape.

    Args:
        profile: text file for a profile of this trainer, with the time of each operation
    """
    torch.set_num_threads(num_threads)
    reference_flops = peak_flops(device_name()) if DEVICE == "cuda" else matmul_flops()
    if reference_flops is None:
        raise UserError(f"the FLOP/s of '{device_name()}' are unknown; add them to PEAK_FLOPS in training/metrics.py")
    print(machine())
    print(f"100 % MFU is {reference_flops / 1e12:.3f} TFLOP/s\n")
    print("| shape | method | useful tokens/s | times the plain loop | MFU | peak memory | useful tokens |")
    print("|---|---|---|---|---|---|---|", flush=True)
    results = []
    for shape in shapes:
        with tempfile.TemporaryDirectory() as folder:
            results.append(measure_shape(shape, Path(folder), repeats, profile, reference_flops))
    for method in ("in chunks", "full logits"):  # with the width and vocabulary of the 1B model
        num_bytes = measure(training_methods.measure_loss, method=method)
        memory = f"{num_bytes / 1e9:.2f} GB more at the peak" if num_bytes else "out of memory"
        print(f"\nmemory of the loss over {LOSS_POSITIONS:,} positions, {method}: {memory}")
    print(json.dumps({"device": device_name(), "results": results}))


def measure_shape(
    shape: str, folder: Path, repeats: int, profile: Path | None, reference_flops: float
) -> dict[str, Any]:
    """Measure one shape and print its table rows; return the entry of this shape in the JSON line."""
    training_methods.write_stand_ins(shape, folder)
    rows = CPU_ROWS if DEVICE == "cpu" else GPU_ROWS
    job = {"shape": shape, "folder": folder, "num_layers": SHAPES[shape].args.n_layers}
    if shape == "8B":  # all layers with optimizer states need 160 GB
        rows = [(OURS, COMPILED)]
        job["num_layers"] = most_layers(job)
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {row: [] for row in rows}
    for _ in range(repeats):
        for method, flags in rows:
            run = measure_training(**job, method=method, flags=flags)
            runs[method, flags] += [run] if run else []
    rates = {row: statistics.median(run["useful_tokens_per_s"] for run in own) for row, own in runs.items() if own}
    plain = rates.get((PLAIN, ""))
    for (method, flags), own in runs.items():
        cells = ["out of memory", "", "", "", ""]
        if own:
            cells = [
                median_and_range([run["useful_tokens_per_s"] for run in own]),
                f"{rates[method, flags] / plain:.2f}" if plain else "",
                f"{100 * own[0]['flops_per_token'] * rates[method, flags] / reference_flops:.1f} %",
                f"{max(run['peak_memory_bytes'] for run in own) / 1e9:.2f} GB",
                f"{100 * own[0]['useful_fraction']:.0f} %",
            ]
        name = f"{method} `{flags}`".removesuffix(" ``")
        print(f"| {shape}, {job['num_layers']} layers | {name} | {' | '.join(cells)} |", flush=True)
    ours = OURS, DEFAULT_FLAGS
    if ours not in rates:
        raise UserError(f"the GPU's memory is too small for this trainer with the shape '{shape}'; use a larger GPU")
    if profile:
        measure_training(**job, method=ours[0], flags=ours[1], profile=profile.with_stem(f"{profile.stem}-{shape}"))
    rate, peak = rates[ours], max(run["peak_memory_bytes"] for run in runs[ours])
    found = {"shape": shape, "num_layers": job["num_layers"], "useful_tokens_per_s": rate, "peak_memory_bytes": peak}
    found |= {"plain_loop_useful_tokens_per_s": plain, "ratio_to_plain_loop": rate / plain if plain else None}
    return found | {"mfu": runs[ours][0]["flops_per_token"] * rate / reference_flops}


def most_layers(job: dict[str, Any]) -> int:
    for num_layers in range(SHAPES["8B"].args.n_layers, 0, -2):
        if measure_training(**job | {"num_layers": num_layers}, method=OURS, flags=COMPILED):
            return num_layers
    raise UserError("two layers of the 8B shape do not fit into this GPU's memory; use a larger GPU")


def measure_training(**job: Any) -> Any:
    """Train in a new process, print the result to standard error, and return it; None means out of memory."""
    result = measure(training_methods.measure_training, **job)
    print(json.dumps(job, default=str), result or "out of memory", file=sys.stderr, flush=True)
    return result


def matmul_flops() -> float:
    """Return the FLOP/s of a float32 matrix product on this CPU, in the fastest of ten runs."""
    a, b = torch.randn(2, 2048, 2048)
    return 2 * 2048**3 / min(timeit.repeat(lambda: a @ b, number=1, repeat=10))


if __name__ == "__main__":
    run_command(bench_train, __doc__)
