"""Every command explains its flags and reports errors in one sentence."""

import ast
import errno
import os
import runpy
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import demo
import fsspec
import pytest
import torch
from conftest import ROOT
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from llama_mimi.audio.reading import Waveform, wav_writer, write_wav
from llama_mimi.common.command_line import report_errors
from llama_mimi.common.errors import UserError
from llama_mimi.generation import loading
from llama_mimi.report.document import Picture, Section, write_html, write_markdown

INTERNAL = {"audited_training", "measuring"}  # started by other commands, with their own arguments
COMMANDS = [
    path
    for folder in ("scripts", "scripts/benchmarks", "scripts/tiny", "eval", ".")
    for path in sorted((ROOT / folder).glob("*.py"))
    if "__main__" in path.read_text() and path.stem not in INTERNAL
]


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_help(path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", [str(path), "--help"])
    monkeypatch.setattr("sys.path", [str(path.parent), *sys.path])
    monkeypatch.setattr("os.environ", dict(os.environ))
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(path), run_name="__main__")
    shown = capsys.readouterr().out
    assert end.value.code in (0, None)
    first_sentence = ast.get_docstring(ast.parse(path.read_text())).split("\n")[0]
    assert first_sentence[:30] in shown and shown.count("--") > 2
    assert "(default: None)" not in " ".join(shown.replace("│", " ").split()), "the text of a flag names its default"


SHOW_HELP = """
import runpy, sys
for command in sys.argv[1:]:
    sys.argv = [command, "--help"]
    try:
        if command.endswith(".py"):
            runpy.run_path(command, run_name="__main__")
        else:
            runpy.run_module(command, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        assert not end.code, command
    heavy = "torch transformers datasets pandas scipy pyarrow soundfile matplotlib gradio torchtitan.train".split()
    assert not {*heavy} & {*sys.modules}, (command, {*heavy} & {*sys.modules})
"""


def test_help_imports_no_large_package():
    """Without large packages, each command answers `--help` and a wrong flag within a second or two."""
    users = [path for path in COMMANDS if path.parent in (ROOT, ROOT / "scripts", ROOT / "eval")]
    assert len(users) > 10
    words = [sys.executable, "-c", SHOW_HELP, "llama_mimi.train", *map(str, users)]
    shown = subprocess.run(words, cwd=ROOT, text=True, capture_output=True)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("usage:") == len(users) + 1 and "options options" not in shown.stdout


def test_an_error_stands_once_and_last_in_what_torchrun_prints(tmp_path, monkeypatch, capsys):
    """Rank 1 fails. Then torchrun stops rank 0."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(SystemExit) as end, report_errors():
        raise UserError("x is 1; set 2")
    ended = ProcessFailure(local_rank=0, pid=1, exitcode=-15, error_file="")
    failed = ProcessFailure(local_rank=1, pid=2, exitcode=end.value.code, error_file=str(tmp_path / "error.json"))
    printed = str(ChildFailedError("command", {0: ended, 1: failed}))
    assert printed.splitlines()[-2:] == ["  error: x is 1; set 2", "=" * 60]
    assert printed.count("x is 1") == 1 and not capsys.readouterr().err


def test_a_full_disk_leaves_no_half_file(tmp_path, monkeypatch, capsys):
    def full(self, path, content):
        Path(path).write_bytes(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(fsspec.filesystem("file")), "pipe_file", full)
    for write in (
        lambda: write_wav(tmp_path / "a.wav", Waveform(torch.zeros(100), 24_000)),
        lambda: write_html("a", [], tmp_path / "a.html"),
        lambda: write_markdown([Section("a", pictures=[Picture("a.png", b"png", "b")])], tmp_path / "a.md"),
    ):
        with pytest.raises(UserError, match=r"a\.\w+' could not be written \(No space left on device\)"):
            write()
    assert not list(tmp_path.iterdir())
    message = r"b\.wav' could not be written \(No space left on device\)"
    with pytest.raises(UserError, match=message), wav_writer(tmp_path / "b.wav", 24_000) as file:
        file.write([0.0] * 100)
        raise OSError("No space left on device")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    (tmp_path / "link.html").symlink_to("a.html")
    write_html("a", [], tmp_path / "link.html")
    assert (tmp_path / "link.html").is_symlink() and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.EROFS, "Read-only", "from", None, "to"), "error: 'to' cannot be used (Read-only file system)"),
        (Exception("I/O: full (os error 28)"), "error: a file cannot be used (No space left on device)"),
    ],
)
def test_an_unusable_file_is_one_sentence(error, sentence, capsys):
    with pytest.raises(SystemExit), report_errors():
        raise error
    assert capsys.readouterr().err.startswith(sentence)


def test_the_demo_runs_its_model_in_one_thread(monkeypatch):
    """gradio calls the page's function in changing threads."""
    apps, threads = [], set()

    def continued(model, prompt, options):
        for _ in range(3):
            threads.add(threading.get_ident())
            yield None, "state"

    monkeypatch.setattr(demo, "continued", continued)
    gradio = MagicMock()
    gradio.Interface = lambda answer, *others, **options: apps.append(answer)
    demo.build_app(gradio, None)
    for _ in range(2):
        with ThreadPoolExecutor(1) as pool:
            assert len(pool.submit(list, apps[0]("prompt.wav", 4, 0.8, 30, 0, 0)).result()) == 3
    assert len(threads) == 1


def test_the_demo_names_a_taken_port_and_no_paths(monkeypatch):
    pytest.importorskip("gradio")
    monkeypatch.setattr(loading, "load_speech_model", lambda *args, **options: None)
    monkeypatch.setattr(demo.shutil, "which", lambda name: name)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} of 127.0.0.1 cannot be opened"):
            demo.demo(port=port)
    apps, gradio = [], MagicMock(Error=ValueError)
    gradio.Interface = lambda answer, *others, **options: apps.append(answer)
    demo.build_app(gradio, SimpleNamespace(codec=SimpleNamespace(sample_rate_hz=24_000, frame_size=1920)))
    with pytest.raises(ValueError, match=r"^'my voice\.wav' does not exist; choose an existing audio file$"):
        list(apps[0]("/tmp/gradio/0a1b/my voice.wav", 4, 0.8, 30, 0, 0))
