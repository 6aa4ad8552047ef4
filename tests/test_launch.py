"""Launching on several nodes. Here nodes are processes of one machine, and small scripts replace SLURM and uv."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

import pytest
from conftest import ROOT

from llama_mimi.report.curves import read_curves

NODES = {"NUM_NODES": "2", "GPUS_PER_NODE": "8", "RDZV_ENDPOINT": "node0:29500"}
JOB = {"SLURM_JOB_NODELIST": "node[0-1]", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_ID": "17"}
TRAINING = ["--job.config_file", "config/tiny.toml"]
# Stand-in for srun: it runs a command for both nodes, and returns an exit code other than 0 if one node fails.
SRUN = """
while [[ $1 == -* ]]; do shift; done
"$@" & first=$!
"$@" & second=$!
code=0
wait $first || code=$?
wait $second || code=$?
exit $code
"""


@pytest.fixture
def commands(tmp_path):
    """A function that writes commands with the given names and contents, and returns the folder of the commands."""

    def put(**scripts):
        for name, script in {"scontrol": "echo 127.0.0.1; echo other", **scripts}.items():
            (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
            (tmp_path / name).chmod(0o755)
        return tmp_path

    return put


@contextmanager
def started(folder, *command, **variables):
    """Start a command with only these cluster variables; after the block, end all processes of the command."""
    ours = {*NODES, "HF_HUB_OFFLINE", "WANDB_MODE"}
    kept = {key: v for key, v in os.environ.items() if key not in ours and not key.startswith("SLURM_")}
    environment = {**kept, "PATH": f"{folder}:{os.environ['PATH']}", **variables}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*map(str, command)], cwd=ROOT, env=environment, start_new_session=True, **pipes)
    try:
        yield process
    finally:  # SIGTERM first: torchrun then ends its ranks, which have process groups of their own
        for number, seconds in ((signal.SIGTERM, 40), (signal.SIGKILL, 10)):
            deadline = time.monotonic() + seconds
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
                while time.monotonic() < deadline:
                    process.poll()  # removes the process from the group if it has ended
                    os.killpg(process.pid, 0)
                    time.sleep(0.05)


def run(folder, *command, timeout=30, **variables):
    with started(folder, *command, **variables) as process:
        stdout, stderr = process.communicate(timeout=timeout)
    return process.returncode, stdout, stderr


@pytest.mark.parametrize("missing", [*NODES, "SLURM_JOB_NODELIST", "arguments"])
def test_what_is_missing_is_named_in_one_sentence(commands, missing):
    folder = commands(uv="echo started")
    nodes = {name: value for name, value in NODES.items() if name != missing}
    command = ["bash", "scripts/train.slurm"] if missing.startswith("SLURM") else ["scripts/train_nodes.sh"]
    code, stdout, stderr = run(folder, *command, *(TRAINING if missing != "arguments" else []), **nodes)
    assert (code, stdout, stderr.count("\n")) == (1, "", 1)
    message = "no options of training are set" if missing == "arguments" else f"{missing} is not set"
    assert stderr.startswith(f"error: {message}; ")


def test_arguments_and_variables_reach_the_training(commands):
    folder = commands(uv='printf "<%s>" "$HF_HUB_OFFLINE" "$WANDB_MODE" "$@"')
    flags = [*TRAINING, "--job.description", "two words"]
    code, stdout, _ = run(folder, "scripts/train_nodes.sh", *flags, **NODES)
    assert code == 0
    assert stdout.startswith("<1><offline><run><--no-sync><torchrun><--nnodes=2><--nproc_per_node=8>")
    assert "<--rdzv_endpoint=node0:29500>" in stdout and stdout.endswith("<--job.description><two words>")
    _, stdout, _ = run(folder, "scripts/train_nodes.sh", *flags, **NODES, HF_HUB_OFFLINE="0", WANDB_MODE="online")
    assert stdout.startswith("<0><online>")


SHOW_ALLOCATOR = """
import os, sys

class Finder:
    def find_spec(self, name, *args):
        if name == "torch":
            print({key: value for key, value in os.environ.items() if key.startswith("PYTORCH_")}, flush=True)
            os._exit(0)

sys.meta_path.insert(0, Finder())
from llama_mimi.train import main
main()
"""


@pytest.mark.parametrize("own", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_pytorch_is_imported_with_expandable_segments_unless_the_user_has_other_settings(own):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTORCH_")}
    environment |= {} if own is None else {own: "max_split_size_mb:512"}
    command = [sys.executable, "-c", SHOW_ALLOCATOR, *TRAINING]
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
    wanted = {own or "PYTORCH_ALLOC_CONF": "max_split_size_mb:512" if own else "expandable_segments:True"}
    assert done.stdout.splitlines()[-1] == str(wanted), done.stderr


def test_a_node_that_fails_fails_the_job(commands):
    folder = commands(srun=SRUN, uv=f"mkdir {commands()}/one || exit 7")  # only one process can create this folder
    assert run(folder, "bash", "scripts/train.slurm", *TRAINING, **JOB)[0] == 7


@pytest.mark.parametrize(
    ("command", "task", "wanted"),
    [
        (["scripts/train.slurm", *TRAINING], {}, "started"),
        (["scripts/study.slurm", "a study.toml"], {}, "run --no-sync python scripts/study.py a study.toml"),
        (
            ["scripts/study.slurm", "a study.toml"],
            {"SLURM_ARRAY_TASK_ID": "3"},
            "run --no-sync python scripts/study.py a study.toml --part 3",
        ),
    ],
    ids=["training", "study", "part of a study"],
)
def test_a_job_whose_time_is_up_queues_itself_again(commands, command, task, wanted):
    folder = commands(
        srun="echo started; exec sleep 60",
        uv='echo "$@"; exec sleep 60',
        scontrol='[ "$1" = show ] && echo node0 || echo "$@"',
    )
    with started(folder, "bash", *command, **JOB, **task) as process:
        assert process.stdout.readline() == wanted + "\n"
        process.send_signal(signal.SIGUSR1)
        assert process.stdout.readline() == "requeue 17\n"


@pytest.mark.slow
def test_a_job_of_two_nodes_trains_on_two_ranks(commands, tmp_path):
    folder = commands(srun=SRUN, uv=f'shift 3; exec {sys.executable} -m torch.distributed.run "$@"')
    dump_folder = tmp_path / "run"
    overrides = {"--training.steps": 2, "--metrics.log_freq": 1, "--job.dump_folder": dump_folder}
    flags = [*TRAINING, "--validation.no-enable", *(word for flag in overrides.items() for word in flag)]
    job = {**JOB, "SLURM_JOB_ID": str(os.getpid() % 5000)}  # the port is this number plus 20000
    code, stdout, stderr = run(folder, "bash", "scripts/train.slurm", *flags, **job, timeout=300)
    assert code == 0, stdout[-4000:] + stderr[-4000:]
    assert read_curves(dump_folder)["loss_metrics/global_avg_loss"].keys() == {1, 2}
    shards = sorted(file.name for file in (dump_folder / "checkpoint" / "step-2").glob("*.distcp"))
    assert shards == ["__0_0.distcp", "__1_0.distcp"]  # one file from each rank
