"""Saved steps of a run: find complete steps, move unwanted steps to another folder, and load weights."""

import re
import warnings
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
from llama_mimi.model.lora import LORA_WEIGHTS

_STEP = r"step-(\d+)"
_HF_INDEX = "model.safetensors.index.json"  # in a step that was saved in the format of Hugging Face


def find_step(checkpoint: Path) -> Path:
    """Return ``checkpoint`` if it is a step, else the newest complete step in it; print newer, incomplete steps."""
    if is_distributed(checkpoint):
        return checkpoint
    steps = complete_steps(checkpoint)
    if not steps:
        problem = f"'{checkpoint}' is not a complete step (step-N with a file {METADATA}) and does not contain one"
        raise UserError(f"{problem}; choose <dump_folder>/checkpoint or one step in it")
    number = max(steps)
    for path in checkpoint.iterdir():
        if (match := re.fullmatch(_STEP, path.name)) and int(match[1]) > number:
            print(f"note: '{path}' is incomplete (the save was interrupted); reading the older step '{steps[number]}'")
    if not is_distributed(steps[number]):
        raise UserError(f"'{steps[number]}' is already in the format of Hugging Face; choose a step in DCP's format")
    return steps[number]


def set_aside_incomplete(checkpoint: Path) -> None:
    """If all steps are incomplete, move them: TorchTitan loads initial weights only if ``checkpoint`` is missing."""
    if not checkpoint.is_dir() or complete_steps(checkpoint):
        return
    paths = list(checkpoint.iterdir())
    others = [path.name for path in paths if not re.fullmatch(_STEP, path.name)]
    if checkpoint.is_symlink() or others:
        fault = "is a symbolic link" if checkpoint.is_symlink() else f"contains '{min(others)}'"
        problem = f"'{checkpoint}' {fault} and does not contain a complete step"
        raise UserError(f"{problem}; rename '{checkpoint}', so that training can load the initial weights")
    _move(paths, f"{checkpoint}.incomplete", "incomplete")
    checkpoint.rmdir()


def set_aside_later(checkpoint: Path, step: int) -> None:
    """Move complete steps after ``step`` to a new folder; otherwise TorchTitan would load them at its next start."""
    if later := [path for number, path in complete_steps(checkpoint).items() if number > step]:
        _move(later, f"{checkpoint}.after-step-{step}", f"saved after step {step}, which the run loads")


def _move(paths: list[Path], name: str, reason: str) -> None:
    aside = next(path for number in count() if not (path := Path(f"{name}-{number}")).exists())
    aside.mkdir()
    for path in paths:
        path.rename(aside / path.name)
    logger.warning(f"moved {len(paths)} steps to '{aside}' ({reason})")


def complete_steps(checkpoint: Path) -> dict[int, Path]:
    """Return the complete steps in a folder by number; raise a `UserError` for names such as step-9-best."""
    steps = {}
    for path in sorted(checkpoint.glob("*")):
        if not any((path / name).is_file() for name in (METADATA, _HF_INDEX)):
            continue
        if match := re.fullmatch(_STEP, path.name):
            steps[int(match[1])] = path
        elif re.search(_STEP, path.name):  # TorchTitan would accept this name
            raise UserError(f"TorchTitan would load '{path}' as a step; move this folder out of '{checkpoint}'")
    return steps


def is_distributed(step: Path) -> bool:
    """Return True if a complete step is in DCP's format, and False if it is in the format of Hugging Face."""
    return (step / METADATA).is_file()


def read_index(step: Path) -> Metadata:
    """Return the index of a step. If a file is missing or truncated, raise an error that names the last good step."""
    try:
        return check_step(step, verify=False)
    except UserError as error:
        raise name_last_good(error, step) from error


def name_last_good(error: UserError, step: Path) -> UserError:
    """Return an error for a damaged step; its message names the newest undamaged step."""
    for _, other in sorted(complete_steps(step.parent).items(), reverse=True):
        if other.name != step.name and is_distributed(other):
            with suppress(UserError, OSError):
                check_step(other, verify=True)
                remedy = f"copy '{step}' from its source again, or move it to another folder"
                return UserError(f"{error}; {remedy} to use the last good step '{other}'")
    return UserError(f"{error}; copy '{step}' again: '{step.parent}' does not contain another usable step")


def load_step(state: dict[str, Any], step: Path, verify: bool) -> None:
    """Load the entries of ``state`` from a step, on all ranks. ``verify``: compare checksums."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # conversion needs only one process
    try:
        dcp.load(state, storage_reader=CheckedReader(step, verify), planner=PlainLoadPlanner())
    except CheckpointException as error:
        failure = first_failure(error)
        if not isinstance(failure, UserError):
            if error.args[0] == "plan":
                problem = f"'{step}' does not fit the config of this run ({first_line(failure)})"
                remedy = "use the config of the run that saved this step, or choose another step"
                raise UserError(f"{problem}; {remedy}") from error
            failure = UserError(f"'{step}' is damaged and cannot be read ({first_line(failure)})")
        raise broadcast_from_rank0(lambda: name_last_good(failure, step)) from error


def load_model_state(step: Path, args: LlamaMimiArgs, verify: bool = True) -> dict[str, torch.Tensor]:
    """Load the float32 weights of a model, and of LoRA, from a step. ``args``: arguments of the model."""
    entries = read_index(step).state_dict_metadata
    with torch.device("meta"):
        wanted = build_model(args).state_dict()
        wanted |= {key: torch.empty(entry.size) for key, entry in entries.items() if key.endswith(LORA_WEIGHTS)}
    state = {name: torch.empty_like(tensor, device="cpu") for name, tensor in wanted.items()}
    load_step(state, step, verify)
    return state
