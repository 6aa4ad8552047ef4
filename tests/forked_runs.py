"""Runs of the trainer one after the other, each on ranks forked from this process, which imports everything once.

Reads a JSON list of [number of ranks, command-line arguments] from standard input; ends with 1 at the first failure.
"""

import json
import os
import signal
import socket
import sys
import time
import traceback
from dataclasses import replace
from types import SimpleNamespace

from llama_mimi import train  # first, as TorchTitan looks for its device when it is imported
from llama_mimi.model import cross_entropy

# isort: split

import torchtitan.train

from llama_mimi.model.llama import FLAVORS

# A pipeline needs an output matrix of its own; of the shipped flavours only the 8B one has it.
FLAVORS["tiny_untied"] = replace(FLAVORS["tiny"], enable_weight_tying=False)
# TorchTitan waits two seconds at the end of every run.
torchtitan.train.time = SimpleNamespace(perf_counter=time.perf_counter, sleep=lambda seconds: None)
# Several chunks a step; by the 515 rows that the first of two ranks has of 1,029 and by the second's 514 they would
# be of other sizes.
cross_entropy.CHUNK_BYTES, cross_entropy.CHUNK_MULTIPLE = 4 * 514 * 127, 1


def train_on_ranks(num_ranks: int, arguments: list[str]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(num_ranks)}
    sys.argv[1:] = arguments
    sys.stdout.flush()
    ranks = {}
    for rank in range(num_ranks):
        if not (pid := os.fork()):
            os._exit(train_as(rank))
        ranks[pid] = rank
    while ranks:
        pid, status = os.wait()
        rank = ranks.pop(pid)
        if status:
            for other in ranks:
                os.kill(other, signal.SIGKILL)
            sys.exit(f"rank {rank} of {num_ranks} failed: {arguments}")


def train_as(rank: int) -> int:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    try:
        train.main()
        return 0
    except BaseException:
        traceback.print_exc()
        return 1


if __name__ == "__main__":
    for num_ranks, arguments in json.load(sys.stdin):
        train_on_ranks(num_ranks, arguments)
