"""What benchmarks share: the line about the machine, measurements in processes of their own, medians."""

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from llama_mimi.common.versions import versions


def device_name() -> str:
    """Name of the GPU, or of the processor where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()} without a GPU"


def machine() -> str:
    """Two lines: what was measured on, and with which versions."""
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    return f"{device_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads\n{packages}\n"


def measured(
    program: str, *words: object, env: Mapping[str, str] | None = None
) -> tuple[dict[str, Any] | None, subprocess.CompletedProcess[str]]:
    """One measurement in a process of its own, which no other has warmed up.

    Returns:
        What the last line of its output says as JSON (None if it failed), and how it ended.
    """
    command = [sys.executable, program, *map(str, words)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    return (None if done.returncode else json.loads(done.stdout.splitlines()[-1])), done


def median_and_range(values: Sequence[float], digits: int = 0) -> str:
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"
