"""What benchmarks share: the line about the machine, measurements in processes of their own or in turn, medians."""

import contextlib
import importlib
import inspect
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from llama_mimi.common.versions import versions

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def device_name() -> str:
    """Name of the GPU, or of the processor where there is none."""
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()} without a GPU"


def machine() -> str:
    """Two lines: what was measured on, and with which versions."""
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    return f"{device_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads\n{packages}\n"


def measured(function: Callable[..., Any], **arguments: Any) -> tuple[Any, subprocess.CompletedProcess[str]]:
    """One measurement in a process of its own, which no other has warmed up, with as many threads as this one.

    Args:
        function: of a script in this folder; what it takes and returns goes through JSON.
        arguments: for the function; paths arrive as strings.

    Returns:
        What the function returned (None if it failed), and how the process ended.
    """
    module = Path(inspect.getfile(function)).stem
    command = [sys.executable, __file__, module, function.__name__, json.dumps(arguments, default=str)]
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    return (None if done.returncode else json.loads(done.stdout.splitlines()[-1])), done


def in_turn(ways: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Results of each way; they take turns, so that a slow minute of the machine hits all of them."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            found[name].append(way())
    return found


def median_and_range(values: Sequence[float], digits: int = 0) -> str:
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def peak_mb() -> float:
    """Most memory this process has held; getrusage would count what its parent held before it."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


if __name__ == "__main__":
    module, function, arguments = sys.argv[1:]
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with contextlib.redirect_stdout(sys.stderr):
        result = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    print(json.dumps(result))
