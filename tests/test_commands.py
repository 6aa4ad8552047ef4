"""Every command explains its flags."""

import ast
import os
import runpy
import sys

import pytest
from conftest import ROOT

INTERNAL = {"audited_training", "training_ways"}  # started by other commands, with their own arguments
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
    assert first_sentence[:30] in shown and "--" in shown


def test_training_lists_its_keys(monkeypatch, capsys):
    from llama_mimi.training.config_file import parse_config

    with pytest.raises(SystemExit) as end:
        parse_config(["--help"])
    assert end.value.code == 0 and "--codec.num-quantizers" in capsys.readouterr().out.replace("_", "-")
