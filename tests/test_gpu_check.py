"""The GPU check fails if training writes no checkpoint. Its commands are replaced here."""

import subprocess
from pathlib import Path

import gpu_check
import pytest
import torch

from llama_mimi.common.errors import UserError


def test_a_check_without_a_step_fails(tmp_path, monkeypatch):
    launched, takes_steps = [], False

    def run(command):
        launched.append(command)
        if takes_steps and "--job.dump_folder" in command:
            step = Path(command[command.index("--job.dump_folder") + 1]) / "checkpoint" / "step-3"
            step.mkdir(parents=True)
            (step / ".metadata").touch()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(gpu_check, "write_stand_ins", lambda folder: None)
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(UserError, match="codes/checkpoint' has no step 3"):
        gpu_check.check_gpus(steps=3, output_dir=tmp_path)
    launched, takes_steps = [], True
    gpu_check.check_gpus(steps=3, output_dir=tmp_path)
    datasets = [command[command.index("--training.dataset") + 1] for command in launched[1:]]
    assert datasets == [str(tmp_path / "codes"), gpu_check.CORPUS]
    with pytest.raises(UserError, match="codes' contains an earlier run"):
        gpu_check.check_gpus(steps=3, output_dir=tmp_path)
