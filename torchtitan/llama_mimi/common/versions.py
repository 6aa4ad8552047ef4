"""Versions of packages, and the git commit."""

import subprocess
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("llama-mimi", "torch", "torchaudio", "transformers", "soundfile", "soxr")  # results depend on these
ROOT = Path(__file__).parents[3]


def versions() -> dict[str, str]:
    """Return the versions of packages, and the git commit ("unknown" outside the repository)."""
    commit = ""
    if (ROOT / ".git").exists():  # else git finds any repository around an installed package
        with suppress(OSError):  # git is not installed
            describe = ["git", "describe", "--always", "--dirty"]
            commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {package: version(package) for package in PACKAGES} | {"commit": commit or "unknown"}
