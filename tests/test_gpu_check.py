"""The check on GPUs, as far as it can be tried without one: it must not pass where nothing was trained."""

import subprocess

import gpu_check
import pytest
import torch

from llama_mimi.errors import UserError


def test_a_check_without_a_step_fails(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["gpu_check", "--output_dir", str(tmp_path), "--steps", "3"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(gpu_check, "write_stand_ins", lambda folder: None)
    monkeypatch.setattr(subprocess, "run", lambda command: subprocess.CompletedProcess(command, 0))
    with pytest.raises(UserError, match="has no step 3"):
        gpu_check.main()
    step = tmp_path / "codes" / "checkpoint" / "step-3"
    step.mkdir(parents=True)
    (step / ".metadata").touch()
    with pytest.raises(UserError, match="holds an earlier run"):
        gpu_check.main()
