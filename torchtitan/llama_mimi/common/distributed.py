"""Communication between the ranks of torchrun, and termination of ranks."""

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

from llama_mimi.common.command_line import is_first_rank
from llama_mimi.common.cpu import available_device
from llama_mimi.common.errors import RANK_ERROR_FILE, UserError, first_line

TIMEOUT = timedelta(days=7)  # at the end, all ranks wait for the slowest rank
SECONDS_BEFORE_OTHERS_REPORT = 10


def end_with_parent() -> None:
    """Let the kernel kill this process when its parent process ends (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def end_with_torchrun() -> None:
    """End this rank when its torchrun ends (Linux only). Otherwise the rank waits for other ranks until a timeout."""
    if sys.platform == "linux" and dist.is_torchelastic_launched():
        end_with_parent()
        # Process 1 is the parent if torchrun was killed during the imports. In a container, torchrun may be process 1.
        if os.getppid() == 1 and b"python" not in Path("/proc/1/cmdline").read_bytes():
            os._exit(1)


class DistributedContext:
    """Ranks of torchrun, or a single process. If ``device`` is None or "cuda", each rank uses its own GPU."""

    def __init__(self, device: str | None = None) -> None:
        end_with_torchrun()
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0))
        if self.world_size > 1:
            if device is not None and device.startswith("cuda:"):
                raise UserError(f"--device {device} names one GPU for all {self.world_size} ranks; use --device cuda")
            dist.init_process_group("gloo", timeout=TIMEOUT)
        if device in (None, "cuda") and torch.cuda.is_available():
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        self.device = available_device(device or "cpu")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def wait(self) -> None:
        gather(None)


def gather(value: Any) -> list[Any]:
    """Return the ``value`` of every rank, in the order of ranks."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(values, value)
    except RuntimeError as error:
        print(f"this rank stops because another rank has stopped ({first_line(error)})", file=sys.stderr)
        sys.exit(1)
    return values


def broadcast_from_rank0(make: Callable[[], Any]) -> Any:
    """Call ``make`` on rank 0. On every rank, return the result, or raise the `UserError` or OSError of ``make``."""
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
    """Delay user errors on ranks above 0, so that only rank 0 reports an error that all ranks raise."""
    try:
        yield
    except (UserError, OSError):
        if not is_first_rank():
            if path := os.environ.get(RANK_ERROR_FILE):  # it may contain a traceback that TorchTitan wrote
                Path(path).unlink(missing_ok=True)
            time.sleep(SECONDS_BEFORE_OTHERS_REPORT)
        raise


@contextmanager
def distributed_context(device: str | None = None) -> Iterator[DistributedContext]:
    """Yield a `DistributedContext`, then close the process group. An error that all ranks raise is reported once."""
    with report_error_once():
        yield DistributedContext(device)
        if dist.is_initialized():
            dist.destroy_process_group()
