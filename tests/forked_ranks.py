"""Ranks without torchrun: they are forked from a server that has imported the trainer, which saves time.

Tests of the README, of launching and of TorchTitan's entry point use torchrun.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parent.parent
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["llama_mimi.trainer"])


class ForkedRanks:
    """The ranks of one run; their working directory is the repository.

    Args:
        command: ``-m llama_mimi.train`` or a script, and its arguments.
        log: file for their output.
        set_up: function that each rank calls first; it must belong to a module.
    """

    def __init__(
        self, num_ranks: int, command: Sequence[object], log: Path, set_up: Callable[[], None] | None = None
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("")
        self._log, self._ranks = log, []
        world = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for rank in range(num_ranks):
            args = world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, [*map(str, command)], str(log), set_up
            self._ranks.append(_server.Process(target=_be_rank, args=args))
            self._ranks[-1].start()

    @property
    def output(self) -> str:
        return self._log.read_text()

    def is_running(self) -> bool:
        return all(rank.is_alive() for rank in self._ranks)

    def kill(self) -> None:
        """Kill all ranks with SIGKILL."""
        for rank in self._ranks:
            rank.kill()
        for rank in self._ranks:
            rank.join()

    def wait(self, timeout: float = 300) -> int:
        """Return the exit code, which is 0 if all ranks succeed. If one fails, kill the others."""
        deadline = time.monotonic() + timeout
        try:
            while any(rank.is_alive() for rank in self._ranks) and not any(rank.exitcode for rank in self._ranks):
                assert time.monotonic() < deadline, self.output[-4000:]
                time.sleep(0.05)
            codes = [rank.exitcode for rank in self._ranks]
        finally:
            self.kill()
        return next((code for code in codes if code), 0)


def run_ranks(num_ranks: int, command: Sequence[object], log: Path, set_up: Callable[[], None] | None = None) -> str:
    """Run a command that must succeed, and return its output."""
    ranks = ForkedRanks(num_ranks, command, log, set_up)
    assert ranks.wait() == 0, ranks.output[-4000:]
    return ranks.output


def _be_rank(environment: dict[str, str], command: list[str], log: str, set_up: Callable[[], None] | None) -> None:
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.environ |= environment
    os.chdir(ROOT)
    multiprocessing.set_start_method("fork", force=True)  # the start method of loader workers is the usual one
    import torchtitan.train

    from llama_mimi import train
    from llama_mimi.common.distributed import end_with_parent

    end_with_parent()  # the parent is the server, which ends with the tests
    # Skip the two seconds that TorchTitan waits at the end of every run.
    torchtitan.train.time = SimpleNamespace(perf_counter=time.perf_counter, sleep=lambda seconds: None)
    if set_up is not None:
        set_up()
    if command[:2] == ["-m", "llama_mimi.train"]:
        sys.argv = command[1:]
        train.main()
    else:
        sys.argv = command
        sys.path.insert(0, str(Path(command[0]).parent))
        runpy.run_path(command[0], run_name="__main__")
