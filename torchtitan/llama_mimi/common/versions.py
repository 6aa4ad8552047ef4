"""Package versions and commit."""

import subprocess
from importlib.metadata import version
from pathlib import Path

FOLDER = Path(__file__).parent.parent  # of the package
PACKAGES = ("llama-mimi", "torch", "torchaudio", "transformers", "soundfile", "soxr")  # results depend on them


def versions() -> dict[str, str]:
    """Return package versions, and the commit if the package is inside this repository."""
    is_ours = _git("rev-parse", "--show-prefix") == f"torchtitan/{FOLDER.name}/"  # not some repository around it
    commit = _git("describe", "--always", "--dirty") if is_ours else ""
    return {package: version(package) for package in PACKAGES} | {"commit": commit or "unknown"}


def _git(*command: str) -> str:
    try:
        return subprocess.run(["git", *command], cwd=FOLDER, capture_output=True, text=True).stdout.strip()
    except OSError:  # git is not installed
        return ""
