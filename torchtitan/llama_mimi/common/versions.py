"""Package versions and commit."""

import subprocess
from importlib.metadata import version
from pathlib import Path

FOLDER = Path(__file__).parent.parent  # of the package


def versions() -> dict[str, str]:
    """Return the versions that results depend on, and the commit if the package is inside this repository."""
    packages = ("llama-mimi", "torch", "torchaudio", "transformers", "soundfile", "soxr")
    is_ours = _git("rev-parse", "--show-prefix") == f"torchtitan/{FOLDER.name}/"  # not some repository around it
    commit = _git("describe", "--always", "--dirty") if is_ours else ""
    return {package: version(package) for package in packages} | {"commit": commit or "unknown"}


def _git(*command: str) -> str:
    try:
        return subprocess.run(["git", *command], cwd=FOLDER, capture_output=True, text=True).stdout.strip()
    except OSError:  # git is not installed
        return ""
