"""Machines without an accelerator."""

import ctypes
import os
import platform
import resource
import sys
from types import SimpleNamespace
from typing import Any

import torch

from llama_mimi.common.errors import UserError

# Options of glibc's mallopt (malloc.h): how many blocks may be mapped one by one, how much free memory is kept, and how
# many heaps there are (those of threads are small, and given back when they are empty).
M_MMAP_MAX, M_TRIM_THRESHOLD, M_ARENA_MAX = -4, -1, -8


def use_cpu_without_gpu() -> None:
    """Let TorchTitan see the CPU as its device; call before the first ``torchtitan`` import.

    TorchTitan asks PyTorch for the accelerator, falls back to "cuda" when there is none, and expects memory
    statistics that ``torch.cpu`` lacks. Where there is a GPU nothing changes.
    """
    if torch.cuda.is_available() or torch._utils._get_available_device_type() == "cpu":  # done before
        return
    assert "torchtitan.tools.utils" not in sys.modules, "TorchTitan has looked for its device already"
    torch._utils._get_available_device_type = lambda: "cpu"
    for name, function in {
        "get_device_name": lambda device=None: platform.processor() or "cpu",
        "get_device_properties": lambda device=None: SimpleNamespace(total_memory=_total_memory()),
        "memory_stats": _memory_stats,
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
        "current_device": lambda: 0,  # torch.cpu answers "cpu"; a barrier wants an index
    }.items():
        setattr(torch.cpu, name, function)


def keep_freed_memory() -> None:
    """Let this process reuse large blocks of memory in place of asking the kernel for each anew.

    The C library of Linux gives a freed block back at once, and the kernel fills the next one with zeros page by page:
    half the time of a codec's convolutions (scripts/benchmarks/bench_data.py). Other C libraries are left as they are.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_ARENA_MAX, 1)


def available_device(name: str) -> torch.device:
    """The device of this name.

    Raises:
        UserError: there is none here.
    """
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"the device '{name}' is not available here; use --device cpu") from error


def _total_memory() -> int:
    """Bytes of physical memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _memory_stats(device: Any = None) -> dict[str, int]:
    """The process's peak resident memory in bytes, under the keys TorchTitan reads."""
    kib = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes on macOS, KiB on Linux
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kib
    return {"active_bytes.all.peak": peak, "reserved_bytes.all.peak": peak}
