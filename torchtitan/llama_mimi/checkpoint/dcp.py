"""Steps of a run: find complete ones, move others aside, and read the model of one in a single process."""

import re
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torchtitan.tools.logging import logger

from llama_mimi.checkpoint.storage import METADATA, CheckedReader, PlainLoadPlanner, check_step, first_failure
from llama_mimi.common.distributed import broadcast_from_rank0
from llama_mimi.common.errors import UserError, first_line
from llama_mimi.model.architectures import build_model
from llama_mimi.model.llama import LlamaMimiArgs

_STEP = r"step-(\d+)"
_HF_INDEX = "model.safetensors.index.json"  # of a last save in Hugging Face's format


def find_step(checkpoint: Path) -> Path:
    """Return ``checkpoint`` itself if it is a step, or else its newest complete step; print newer incomplete ones."""
    if is_distributed(checkpoint):
        return checkpoint
    steps = complete_steps(checkpoint)
    if not steps:
        problem = f"'{checkpoint}' is not a complete step and contains none (step-N with a file {METADATA})"
        raise UserError(f"{problem}; name <dump_folder>/checkpoint or one step in it")
    number = max(steps)
    for path in checkpoint.iterdir():
        if (match := re.fullmatch(_STEP, path.name)) and int(match[1]) > number:
            print(f"note: '{path}' is incomplete (its saving was cut off); reading the older '{steps[number]}'")
    if not is_distributed(steps[number]):
        raise UserError(f"'{steps[number]}' is in Hugging Face's format already; name another step")
    return steps[number]


def set_aside_incomplete(checkpoint: Path) -> Path | None:
    """Move the steps of a folder that has no complete one into a new folder, and return that.

    TorchTitan loads initial weights only if there is no checkpoint folder: a run that was killed while it saved its
    first step would start from random weights.
    """
    if not checkpoint.is_dir() or complete_steps(checkpoint):
        return None
    paths = list(checkpoint.iterdir())
    if checkpoint.is_symlink() or not all(re.fullmatch(_STEP, path.name) for path in paths):
        problem = f"'{checkpoint}' has no complete step, but prevents that initial weights are loaded"
        raise UserError(f"{problem}; as it is a link or contains other files, move it yourself")
    aside = _move(paths, f"{checkpoint}.incomplete")
    checkpoint.rmdir()
    return aside


def set_aside_later(checkpoint: Path, step: int) -> Path | None:
    """Move the complete steps after ``step``, if any, into a new folder, and return that.

    By their numbers TorchTitan would keep them instead of the new steps, and load them at its next start.
    """
    later = [path for number, path in complete_steps(checkpoint).items() if number > step]
    return _move(later, f"{checkpoint}.after-step-{step}") if later else None


def _move(paths: list[Path], name: str) -> Path:
    aside = next(path for number in count() if not (path := Path(f"{name}-{number}")).exists())
    aside.mkdir()
    for path in paths:
        path.rename(aside / path.name)
    logger.warning(f"{len(paths)} incomplete or later steps were moved to '{aside}'")
    return aside


def complete_steps(checkpoint: Path) -> dict[int, Path]:
    """Return the complete steps in a checkpoint folder, by number; a `UserError` refuses names such as step-9-best."""
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


def read_index(step: Path) -> Metadata:
    """Return the index of a step whose files are complete; a `UserError` also names the last good step."""
    try:
        return check_step(step, verify=False)
    except UserError as error:
        raise name_last_good(error, step) from error


def name_last_good(error: UserError, step: Path) -> UserError:
    """Return the error of a damaged step together with the newest other step whose files and checksums are right."""
    for _, other in sorted(complete_steps(step.parent).items(), reverse=True):
        if other.name != step.name and is_distributed(other):
            with suppress(UserError, OSError):
                check_step(other, verify=True)
                return UserError(f"{error}; copy it again, or move '{step}' away and use the last good step '{other}'")
    return UserError(f"{error}; copy it again: no other step in '{step.parent}' is good")


def load_step(state: dict[str, Any], step: Path, verify: bool) -> None:
    """Load the entries of ``state`` from a step, on all ranks; ``verify`` compares checksums."""
    try:
        dcp.load(state, storage_reader=CheckedReader(step, verify), planner=PlainLoadPlanner())
    except CheckpointException as error:
        failure = first_failure(error)
        if not isinstance(failure, UserError):
            if error.args[0] == "plan":
                raise UserError(f"'{step}' does not fit this run ({first_line(failure)}); change the config") from error
            failure = UserError(f"'{step}' is damaged and cannot be read ({first_line(failure)})")
        raise broadcast_from_rank0(lambda: name_last_good(failure, step)) from error


def load_model_state(step: Path, args: LlamaMimiArgs, verify: bool = True) -> dict[str, torch.Tensor]:
    """Return the weights of a model of shape ``args`` from one step, as float32; a `UserError` names a wrong one."""
    read_index(step)
    with torch.device("meta"):
        wanted = build_model(args).state_dict()
    state = {name: torch.empty_like(tensor, device="cpu") for name, tensor in wanted.items()}
    load_step(state, step, verify)
    for name, tensor in state.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"'{step}' has NaN or infinite values in '{name}'; use an earlier step")
    return state
