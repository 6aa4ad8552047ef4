"""Ranks end when their torchrun ends."""

import subprocess
import sys

import pytest
from conftest import ROOT

from llama_mimi.common.distributed import DistributedContext
from llama_mimi.common.errors import UserError

# The process group is never created. Each rank waits, as if another rank had ended.
WAITING = """
import sys, time
from llama_mimi.{module} import {name}
import torch.distributed as dist

def wait(*args, **kwargs):
    print("waiting", flush=True)
    time.sleep(100)

dist.rendezvous = dist.init_process_group = wait
sys.argv[1:] = ["--job.config_file", "config/tiny.toml"]
{name}()
"""


def test_one_gpu_for_several_ranks_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(UserError, match="--device cuda:0 names one GPU for all 8 ranks; use --device cuda"):
        DistributedContext("cuda:0")


@pytest.mark.slow
@pytest.mark.parametrize(("module", "name"), [("common.distributed", "DistributedContext"), ("train", "main")])
def test_a_rank_ends_with_its_torchrun_while_others_are_awaited(tmp_path, module, name):
    script = tmp_path / "rank.py"
    script.write_text(WAITING.format(module=module, name=name))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    waiting = 0
    while waiting < 2:
        line = process.stdout.readline()
        assert line, "it ended before"
        waiting += line.count(b"waiting")
    process.kill()
    process.communicate(timeout=20)  # the output ends when the last rank ends
