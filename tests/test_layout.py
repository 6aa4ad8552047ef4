"""Imports run one way: every room says what it may import, and does not go beyond it."""

import ast
import re
import subprocess
from pathlib import Path

import pytest
import torchtitan
from conftest import ROOT

PACKAGE = ROOT / "torchtitan" / "llama_mimi"
ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
TOP = {"train", "train_spec", "job_config"}


def imported(path: Path) -> set[str]:
    """Parts of this package that a file imports, such as ``data``; scripts by their name."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: one way to import is enough"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def rooms(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imported(path) if name.startswith("llama_mimi.")}


def allowed(room: str) -> set[str]:
    doc = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text()))
    (said,) = re.findall(r"^May import: (.*)\.$", doc, re.M)
    return set() if said.startswith("nothing") else set(said.split(", "))


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_what_it_says(room):
    found = set().union(*(rooms(path) for path in (PACKAGE / room).glob("*.py"))) - {room}
    assert found == allowed(room), "neither more nor less"


def test_no_arrow_runs_back_up():
    assert all(allowed(room) & TOP <= {"job_config"} for room in ROOMS)
    below = {room: allowed(room) - TOP for room in ROOMS}
    floors: list[str] = []
    while below:
        lowest = {room for room, others in below.items() if others <= set(floors)}
        assert lowest, f"a circle among {sorted(below)}"
        floors += sorted(lowest)
        below = {room: others for room, others in below.items() if room not in lowest}
    assert rooms(PACKAGE / "job_config.py") <= {"audio", "tokens"}, "training may import it"


def test_every_module_has_a_room():
    assert {path.stem for path in PACKAGE.glob("*.py")} == TOP | {"__init__"}
    assert not [path for path in PACKAGE.rglob("*.py") if not (path.parent / "__init__.py").exists()]
    for room in ROOMS:  # a docstring; nothing is re-exported
        assert len(ast.parse((PACKAGE / room / "__init__.py").read_text()).body) == 1


def test_no_module_is_ignored_by_git():
    """A pattern such as `data/` would leave it out of commits and of the built package."""
    files = [str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*.py")]
    assert not subprocess.run(["git", "check-ignore", "--no-index", *files], cwd=ROOT, capture_output=True).stdout


def test_the_package_needs_no_script():
    scripts = {path.stem for path in (ROOT / "scripts").rglob("*.py")}
    for path in PACKAGE.rglob("*.py"):
        assert not {name.split(".")[0] for name in imported(path)} & scripts, path


def test_the_engine_is_not_shadowed():
    assert not (ROOT / "torchtitan" / "__init__.py").exists()
    assert ROOT / "torchtitan" not in Path(torchtitan.__file__).parents
