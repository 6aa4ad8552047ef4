"""Package versions and commit that a result was made with."""

import subprocess
from importlib.metadata import version
from pathlib import Path

FOLDER = Path(__file__).parent.parent  # of the package


def versions() -> dict[str, str]:
    """Versions that numbers depend on, and this repository's commit where the package lies in it."""
    packages = ("llama-mimi", "torch", "torchaudio", "transformers", "soundfile", "soxr")
    is_ours = _git("rev-parse", "--show-prefix") == f"torchtitan/{FOLDER.name}/"  # not a repository that it lies in
    commit = _git("describe", "--always", "--dirty") if is_ours else ""
    return {package: version(package) for package in packages} | {"commit": commit or "unknown"}


def _git(*command: str) -> str:
    try:
        return subprocess.run(["git", *command], cwd=FOLDER, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git here
        return ""
