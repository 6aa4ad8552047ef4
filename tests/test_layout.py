"""Imports point down, and packages are what git and the engine expect."""

import ast
import subprocess
from pathlib import Path

import torchtitan
from conftest import ROOT

PACKAGE = ROOT / "torchtitan" / "llama_mimi"
# From the bottom up. A module imports its own package and lower floors; all of it is below scripts/ and eval/.
FLOORS = (
    "common",
    "audio",
    "tokens corpora",
    "generation data model job_config",
    "evaluation",
    "report checkpoint",
    "training judging",
    "study train_spec",
    "trainer",
    "train dry_run",
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names.split()}


def imported(path: Path) -> set[str]:
    """Return the full names of everything that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_imports_do_not_point_up():
    scripts = {path.stem for path in (ROOT / "scripts").rglob("*.py")} | {"eval", "inference"}
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).with_suffix("").parts[0]
        names = [name.split(".") for name in imported(path)]
        assert not {name[0] for name in names} & scripts, path
        for other in {name[1] for name in names if name[0] == "llama_mimi"} - {own}:
            assert FLOOR[other] < FLOOR[own], f"{path} imports {other}"


def test_no_module_is_ignored_by_git():
    """A pattern such as `data/` would exclude it from commits and from the built package."""
    files = [str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*.py")]
    assert not subprocess.run(["git", "check-ignore", "--no-index", *files], cwd=ROOT, capture_output=True).stdout


def test_the_engine_is_not_shadowed():
    assert not (ROOT / "torchtitan" / "__init__.py").exists()
    assert ROOT / "torchtitan" not in Path(torchtitan.__file__).parents
