"""Launching on several nodes, which here are processes of this machine: SLURM and uv are played by small scripts."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from conftest import ROOT
from plot_run import TOTAL

from llama_mimi.report.curves import read_curves

NODES = {"NUM_NODES": "2", "GPUS_PER_NODE": "8", "RDZV_ENDPOINT": "node0:29500"}
JOB = {"SLURM_JOB_NODELIST": "node[0-1]", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_ID": "17"}
TRAINING = ["--job.config_file", "config/tiny.toml"]
# Drops its options, starts what follows as both nodes, and ends as badly as the worse of them.
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
    """Puts commands of these names and contents in front of the path; returns the folder."""

    def put(**scripts):
        for name, script in {"scontrol": "echo 127.0.0.1; echo other", **scripts}.items():
            (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
            (tmp_path / name).chmod(0o755)
        return tmp_path

    return put


@contextmanager
def started(folder, *command, **variables):
    """A command with no variables of a cluster but these, and whose processes all end with the block."""
    ours = {*NODES, "HF_HUB_OFFLINE", "WANDB_MODE"}
    kept = {key: v for key, v in os.environ.items() if key not in ours and not key.startswith("SLURM_")}
    process = subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        env={**kept, "PATH": f"{folder}:{os.environ['PATH']}", **variables},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        end_group(process)


def end_group(process):
    """Ends the group of a process, first so that torchrun ends its ranks, which are groups of their own."""
    for number, seconds in ((signal.SIGTERM, 40), (signal.SIGKILL, 10)):
        deadline = time.monotonic() + seconds
        try:
            os.killpg(process.pid, number)
            while time.monotonic() < deadline:
                process.poll()  # a process that nobody has waited for is still in the group
                os.killpg(process.pid, 0)
                time.sleep(0.05)
        except ProcessLookupError:
            return


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
    message = "there is nothing to train" if missing == "arguments" else f"{missing} is not set"
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


def test_a_node_that_fails_fails_the_job(commands):
    folder = commands(srun=SRUN, uv=f"mkdir {commands()}/one || exit 7")  # the first gets the folder, the second fails
    assert run(folder, "bash", "scripts/train.slurm", *TRAINING, **JOB)[0] == 7


def test_a_job_whose_time_is_up_queues_itself_anew(commands):
    folder = commands(srun="echo started; exec sleep 60", scontrol='[ "$1" = show ] && echo node0 || echo "$@"')
    with started(folder, "bash", "scripts/train.slurm", *TRAINING, **JOB) as process:
        assert process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGUSR1)
        assert process.stdout.readline() == "requeue 17\n"


@pytest.mark.parametrize("part", [None, 3])
def test_a_job_of_a_study(commands, part):
    """It does its part of the array, or else the rest; and queues itself anew when its time is up."""
    folder = commands(uv='echo "$@"; exec sleep 60', scontrol='echo "$@"')
    job = {"SLURM_JOB_ID": "17"} | ({} if part is None else {"SLURM_ARRAY_TASK_ID": str(part)})
    with started(folder, "bash", "scripts/study.slurm", "a study.toml", **job) as process:
        wanted = "run --no-sync python scripts/study.py a study.toml" + ("" if part is None else " --part 3")
        assert process.stdout.readline() == wanted + "\n"
        process.send_signal(signal.SIGUSR1)
        assert process.stdout.readline() == "requeue 17\n"


@pytest.mark.slow
@pytest.mark.distributed
def test_a_job_of_two_nodes_trains_on_two_ranks(commands, tmp_path):
    folder = commands(srun=SRUN, uv=f'shift 3; exec {sys.executable} -m torch.distributed.run "$@"')
    dump_folder = tmp_path / "run"
    overrides = {"--training.steps": 2, "--metrics.log_freq": 1, "--job.dump_folder": dump_folder}
    flags = [*TRAINING, "--validation.no-enable", *(word for flag in overrides.items() for word in flag)]
    job = {**JOB, "SLURM_JOB_ID": str(free_port() - 20000)}
    code, stdout, stderr = run(folder, "bash", "scripts/train.slurm", *flags, **job, timeout=300)
    assert code == 0, stdout[-4000:] + stderr[-4000:]
    assert read_curves(dump_folder)[TOTAL].keys() == {1, 2}
    shards = sorted(file.name for file in (dump_folder / "checkpoint" / "step-2").glob("*.distcp"))
    assert shards == ["__0_0.distcp", "__1_0.distcp"]  # of ranks 0 and 1


def free_port():
    """One of those that jobs use."""
    for port in range(20000 + os.getpid() % 5000, 30000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError("no port is free")
