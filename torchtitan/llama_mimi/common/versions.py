"""Package versions and commit."""

import subprocess
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("llama-mimi", "torch", "torchaudio", "transformers", "soundfile", "soxr")  # results depend on them
ROOT = Path(__file__).parents[3]


def versions() -> dict[str, str]:
    """Return package versions, and the commit if the package is inside this repository."""
    commit = ""
    if (ROOT / ".git").exists():  # git itself would also find a repository around an installed package
        with suppress(OSError):  # git is not installed
            describe = ["git", "describe", "--always", "--dirty"]
            commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {package: version(package) for package in PACKAGES} | {"commit": commit or "unknown"}
