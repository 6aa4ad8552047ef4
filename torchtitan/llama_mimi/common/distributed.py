"""The ranks of torchrun: objects that they share, and how they end."""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llama_mimi.common.cpu import available_device
from llama_mimi.common.errors import RANK_ERROR_FILE, UserError, first_line

TIMEOUT = timedelta(days=7)  # at the end all ranks wait for the slowest
SECONDS_BEFORE_OTHERS_REPORT = 10


def end_with_parent() -> None:
    """Let the kernel kill this process when its parent ends, even if that is killed (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def end_with_torchrun() -> None:
    """End this rank with its torchrun (Linux only); it would wait for other ranks until its timeout."""
    if sys.platform == "linux" and dist.is_torchelastic_launched():
        end_with_parent()
        # An orphan, whose torchrun was killed during the imports, belongs to process 1, as a container's torchrun is.
        if os.getppid() == 1 and b"python" not in Path("/proc/1/cmdline").read_bytes():
            os._exit(1)


class DistributedContext:
    """The ranks of torchrun, or this process alone; without a device or with "cuda" each rank has its own GPU."""

    def __init__(self, device: str | None = None) -> None:
        end_with_torchrun()
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0))
        self._store: dist.Store = dist.HashStore()
        if self.world_size > 1:
            self._store, _, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))
            world = {"rank": self.rank, "world_size": self.world_size}
            dist.init_process_group("gloo", store=self._store, timeout=TIMEOUT, **world)
            if device is not None and device.startswith("cuda:"):
                raise UserError(f"--device {device} is one GPU for {self.world_size} ranks; leave the number out")
        if device in (None, "cuda") and torch.cuda.is_available():
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        self.device = available_device(device or "cpu")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def add(self, counter: str, number: int) -> int:
        """Add to a shared counter and return its value."""
        return self._store.add(counter, number)

    def wait(self) -> None:
        gather(None)


def gather(value: Any) -> list[Any]:
    """Return ``value`` of every rank, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(values, value)
    except RuntimeError as error:
        print(f"another rank has ended, so this one ends, too ({first_line(error)})", file=sys.stderr)
        sys.exit(1)
    return values


def broadcast_from_rank0(make: Callable[[], Any]) -> Any:
    """Call ``make`` on rank 0 and return its result, or raise its `UserError` or OSError, on every rank."""
    outcome: Any = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            outcome = make()
        except (UserError, OSError) as error:
            outcome = error
    outcome = gather(outcome)[0]
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


@contextmanager
def report_error_once() -> Iterator[None]:
    """Delay an error that `run_cli` reports: if all ranks raise it, rank 0 reports it, and torchrun ends the others."""
    try:
        yield
    except (UserError, OSError):
        if int(os.environ.get("RANK", 0)):
            if path := os.environ.get(RANK_ERROR_FILE):  # TorchTitan may have written a traceback there
                Path(path).unlink(missing_ok=True)
            time.sleep(SECONDS_BEFORE_OTHERS_REPORT)
        raise


@contextmanager
def distributed_context(device: str | None = None) -> Iterator[DistributedContext]:
    """Yield `DistributedContext` and end their process group; a user error that all ranks raise is reported once."""
    with report_error_once():
        yield DistributedContext(device)
        if dist.is_initialized():
            dist.destroy_process_group()
