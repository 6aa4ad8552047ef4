"""What a result was made with."""

import subprocess
from importlib.metadata import version
from pathlib import Path


def versions() -> dict[str, str]:
    """Versions a score depends on, and this repository's commit where it is one."""
    packages = ("llama-mimi", "torch", "torchaudio", "transformers", "soundfile")
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return {package: version(package) for package in packages} | {"commit": git.stdout.strip() or "unknown"}
