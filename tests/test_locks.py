"""Locks of folders that two processes use."""

import errno
import fcntl
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from llama_mimi.common.errors import UserError
from llama_mimi.common.files import LOCK, locked
from llama_mimi.judging import script
from llama_mimi.judging.options import GenerationOptions, PromptOptions
from llama_mimi.training.checks import prepare_run
from llama_mimi.training.config_file import parse_config

HOLD = (
    "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB); print(1, flush=True)"
)


def test_a_second_trainer_is_refused_until_the_first_ends(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = parse_config(["--job.config_file", "config/tiny.toml", "--job.dump_folder", str(tmp_path)])
    hold = [sys.executable, "-c", f"{HOLD}; sys.stdin.read()", tmp_path / LOCK]
    first = subprocess.Popen(hold, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert first.stdout.readline()
        with pytest.raises(UserError, match="another process writes to .* choose another job.dump_folder"):
            prepare_run(config)
        assert not (tmp_path / "job_config.json").exists(), "a run that is refused writes nothing"
    finally:
        first.kill()
        first.communicate()
    prepare_run(config)
    assert (tmp_path / "job_config.json").exists()
    assert subprocess.run([sys.executable, "-c", HOLD, tmp_path / LOCK], capture_output=True).returncode, "to its end"


def test_a_lock_is_waited_for(tmp_path, monkeypatch, capsys):
    calls = []

    def lockf(file, flags):
        calls.append(flags)
        if flags & fcntl.LOCK_NB:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))  # error of some systems for a file that is locked

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with locked(tmp_path / LOCK, "output_dir", wait=True):
        assert calls == [fcntl.LOCK_EX | fcntl.LOCK_NB, fcntl.LOCK_EX]
    assert "waiting for another process" in capsys.readouterr().out
    with pytest.raises(UserError, match="another process writes to"), locked(tmp_path / LOCK, "output_dir"):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_warned_of(number, tmp_path, monkeypatch, capsys):
    def lockf(file, flags):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with locked(tmp_path / "new" / LOCK, "output_dir", wait=True):
        assert "cannot be locked" in capsys.readouterr().out


def test_prompts_are_cut_by_one_process_at_a_time(tmp_path, monkeypatch):
    def make_prompts(folder, options, texts):
        for name in (LOCK, f".mine{LOCK}"):
            assert subprocess.run([sys.executable, "-c", HOLD, folder / name], capture_output=True).returncode
        raise UserError("seen")

    monkeypatch.setattr(script, "make_prompts", make_prompts)
    options = GenerationOptions(prompts=PromptOptions(corpus="x"), model_name="m", name="mine", output_dir=tmp_path)
    with pytest.raises(UserError, match="seen"):
        script.judge_generations(options)
