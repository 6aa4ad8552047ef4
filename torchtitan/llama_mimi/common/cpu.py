"""Support for machines without an accelerator."""

import ctypes
import os
import platform
import resource
import sys
from types import SimpleNamespace
from typing import Any

import torch

from llama_mimi.common.errors import UserError


def use_cpu_without_gpu() -> None:
    """Make TorchTitan use the CPU if the machine lacks a GPU. Call this before the first ``torchtitan`` import.

    Otherwise TorchTitan selects "cuda" and reads memory statistics that ``torch.cpu`` does not provide.
    """
    if torch.cuda.is_available() or torch._utils._get_available_device_type() == "cpu":  # called before
        return
    assert "torchtitan.tools.utils" not in sys.modules, "TorchTitan is already imported"
    torch._utils._get_available_device_type = lambda: "cpu"
    total_memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    unit = 1 if sys.platform == "darwin" else 1024  # unit of ru_maxrss: bytes on macOS, KiB on Linux

    def memory_stats(device: Any = None) -> dict[str, int]:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return {"active_bytes.all.peak": peak, "reserved_bytes.all.peak": peak}

    vars(torch.cpu).update(
        get_device_name=lambda device=None: platform.processor() or "cpu",
        get_device_properties=lambda device=None: SimpleNamespace(total_memory=total_memory),
        memory_stats=memory_stats,
        reset_peak_memory_stats=lambda device=None: None,
        empty_cache=lambda: None,
        current_device=lambda: 0,  # torch.cpu returns "cpu", but a barrier needs an index
    )


def keep_freed_memory() -> None:
    """Make glibc reuse freed memory. Otherwise, half of a convolution's time is spent on zeroing new memory."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: do not map single blocks
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep free memory
        libc.mallopt(-8, 1)  # M_ARENA_MAX: one heap for all threads; heaps of threads are freed when empty


def available_device(name: str) -> torch.device:
    """Return a device by name; raise a `UserError` if this machine lacks the device."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"the device '{name}' is not available; use --device cpu, or start fewer ranks") from error
