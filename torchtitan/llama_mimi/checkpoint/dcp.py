"""Steps of a run: find complete ones, move others aside, and read the model of one in a single process."""

import re
from collections.abc import Iterable
from contextlib import suppress
from itertools import count
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from llama_mimi.checkpoint.storage import METADATA, CheckedReader, check_step
from llama_mimi.common.errors import UserError
from llama_mimi.model.architectures import build_model
from llama_mimi.model.llama import LlamaMimiArgs

_STEP = r"step-(\d+)"
_HF_INDEX = "model.safetensors.index.json"  # of a last save in Hugging Face's format


def find_step(checkpoint: Path) -> tuple[Path, list[Path]]:
    """Return ``checkpoint`` itself if it is a step, or else its newest complete step, and the newer incomplete steps.

    Raises:
        UserError: there is no complete step, or it is in Hugging Face's format.
    """
    if is_distributed(checkpoint):
        return checkpoint, []
    steps = complete_steps(checkpoint)
    if not steps:
        raise UserError(
            f"'{checkpoint}' is not a complete step and contains none (step-N with a file {METADATA}); name "
            "<dump_folder>/checkpoint or one step in it"
        )
    number = max(steps)
    if not is_distributed(steps[number]):
        raise UserError(f"'{steps[number]}' was saved in Hugging Face's format; name another step")
    there = {int(match[1]): path for path in checkpoint.iterdir() if (match := re.fullmatch(_STEP, path.name))}
    return steps[number], [there[other] for other in sorted(there, reverse=True) if other > number]


def set_aside_incomplete(checkpoint: Path) -> Path | None:
    """Move a checkpoint folder that contains nothing but incomplete steps out of the way.

    TorchTitan loads initial weights only if there is no checkpoint folder. A run that was killed while it saved its
    first step, or whose steps were removed, would otherwise start from random weights.

    Returns:
        The new path, or None if there is no folder or it has a complete step.

    Raises:
        UserError: the folder contains something else, or cannot be moved.
    """
    if not checkpoint.is_dir() or complete_steps(checkpoint):
        return None
    if checkpoint.is_symlink() or not all(re.fullmatch(_STEP, path.name) for path in checkpoint.iterdir()):
        raise UserError(
            f"'{checkpoint}' has no complete step, but prevents that initial weights are loaded; as it is a link or "
            "contains other files, move it yourself, or choose another checkpoint.folder"
        )
    aside = _move(checkpoint.iterdir(), f"{checkpoint}.incomplete")
    checkpoint.rmdir()
    return aside


def set_aside_later(checkpoint: Path, step: int) -> Path | None:
    """Move the complete steps after ``step`` out of a checkpoint folder, for a run that continues from ``step``.

    By their numbers TorchTitan would keep them instead of the run's new steps, and load them at its next start.

    Returns:
        The folder of the moved steps, or None if there are none.

    Raises:
        UserError: they cannot be moved.
    """
    later = [path for number, path in complete_steps(checkpoint).items() if number > step]
    return _move(later, f"{checkpoint}.after-step-{step}") if later else None


def _move(paths: Iterable[Path], name: str) -> Path:
    """Move files into a new folder, whose name begins with ``name``."""
    aside = next(path for number in count() if not (path := Path(f"{name}-{number}")).exists())
    try:
        aside.mkdir()
        for path in list(paths):
            path.rename(aside / path.name)
    except OSError as error:
        raise UserError(f"'{error.filename}' cannot be moved to '{aside}' ({error.strerror}); move it") from error
    return aside


def complete_steps(checkpoint: Path) -> dict[int, Path]:
    """Return the complete steps in a checkpoint folder, by number.

    Raises:
        UserError: TorchTitan would take a folder for another step than its name says.
    """
    steps = {}
    for path in sorted(checkpoint.glob("*")):
        if not any((path / name).is_file() for name in (METADATA, _HF_INDEX)):
            continue
        if match := re.fullmatch(_STEP, path.name):
            steps[int(match[1])] = path
        elif re.search(_STEP, path.name):  # TorchTitan looks for it anywhere in a name
            raise UserError(f"'{path}' would be taken for a step of the run; move it out of '{checkpoint}'")
    return steps


def is_distributed(step: Path) -> bool:
    """Return True if a complete step is a distributed checkpoint, not weights in Hugging Face's format."""
    return (step / METADATA).is_file()


def read_index(step: Path, verify: bool) -> Metadata:
    """Return the index of a step after `check_step`.

    Raises:
        UserError: a file is missing, truncated or damaged; it names the last good step.
    """
    try:
        return check_step(step, verify)
    except UserError as error:
        raise name_last_good(error, step) from error


def name_last_good(error: UserError, step: Path) -> UserError:
    """Return the error of a damaged step together with the newest other step whose files and checksums are right."""
    if not re.fullmatch(_STEP, step.name):
        return UserError(f"{error}; copy it again, or name a step of a run")
    others = complete_steps(step.parent)
    for _, other in sorted(others.items(), reverse=True):
        if other.name != step.name and is_distributed(other):
            with suppress(UserError):
                check_step(other, verify=True)
                return UserError(f"{error}; copy it again, or move '{step}' away and use the last good step '{other}'")
    return UserError(f"{error}; copy it again: no other step in '{step.parent}' is good")


def load_model_state(step: Path, args: LlamaMimiArgs, verify: bool = True) -> dict[str, torch.Tensor]:
    """Return the weights of a model of shape ``args`` from one step, in the precision they were saved in.

    Args:
        verify: compare the checksums of the whole step, including optimizer and loader states.

    Raises:
        UserError: files are damaged or missing, or the weights are not those of ``args``.
    """
    metadata = read_index(step, verify)
    with torch.device("meta"):
        expected = build_model(args).state_dict()
    state = {}
    for name, tensor in expected.items():
        saved = metadata.state_dict_metadata.get(name)
        if not isinstance(saved, TensorStorageMetadata):
            raise UserError(f"'{step}' lacks the weight '{name}'; name a checkpoint of this model")
        if saved.size != tensor.shape:
            raise UserError(
                f"'{step}' has '{name}' of shape {tuple(saved.size)}, but the run's model needs "
                f"{tuple(tensor.shape)}; vocabulary, num_quantizers or shape are of another run"
            )
        state[name] = torch.empty(saved.size, dtype=saved.properties.dtype)
    try:
        dcp.load(state, storage_reader=CheckedReader(step, verify=False), no_dist=True)
    except (CheckpointException, RuntimeError, OSError, EOFError) as error:
        last_line = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise UserError(f"'{step}' is damaged and cannot be read: {last_line[0]}") from error
    for name, tensor in state.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"'{step}' has NaN or infinite values in '{name}'; use an earlier step")
    return state
