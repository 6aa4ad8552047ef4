"""Shared functions of the benchmarks: description of the machine, measurements in a new process, medians."""

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

from llama_mimi.common.errors import UserError
from llama_mimi.common.versions import versions

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def device_name() -> str:
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()} without a GPU"


def machine() -> str:
    """Return a line that describes the machine, and a line with package versions."""
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    return f"{device_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads\n{packages}\n"


def measure(function: Callable[..., Any], **arguments: Any) -> Any:
    """Call a function of a script in this folder, in a new process with as many threads as this process.

    Arguments and result are passed as JSON, so paths become strings. Return None if the memory of the GPU is too small;
    raise a `UserError` with the traceback if the call fails.
    """
    module = Path(inspect.getfile(function)).stem
    command = [sys.executable, __file__, module, function.__name__, json.dumps(arguments, default=str)]
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        problem = f"{function.__name__} in {module}.py failed with the arguments {arguments}"
        raise UserError(f"{problem}; fix this error: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def alternate(methods: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Call the methods in turn, ``repeats`` times, so that a slow minute affects all methods; return the results."""
    results: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(repeats):
        for name, method in methods.items():
            results[name].append(method())
    return results


def median_and_range(values: Sequence[float], digits: int = 0) -> str:
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def peak_mb() -> float:
    """Return the peak memory of this process, in MB; getrusage would include the memory of the parent process."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


if __name__ == "__main__":
    module, function, arguments = sys.argv[1:]
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    result = None
    with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(torch.OutOfMemoryError):
        result = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    print(json.dumps(result))
