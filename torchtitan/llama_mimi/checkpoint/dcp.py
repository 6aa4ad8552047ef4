"""Reading the model out of a distributed checkpoint (DCP), in one process and without the trainer."""

import re
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
    """The step to read: ``checkpoint`` itself, or the newest complete step in it.

    Returns:
        The step's folder, and the newer steps that were passed over because their saving was cut off.

    Raises:
        UserError: no such folder, no step in it, or none that is complete.
    """
    if not checkpoint.is_dir():
        raise UserError(f"the checkpoint '{checkpoint}' is no folder; name <dump_folder>/checkpoint or one step of it")
    if is_distributed(checkpoint):
        return checkpoint, []
    there = {int(m[1]): path for path in checkpoint.iterdir() if (m := re.fullmatch(_STEP, path.name))}
    complete = complete_steps(checkpoint)
    if complete:
        newest = max(complete)
        if not is_distributed(complete[newest]):
            raise UserError(f"'{complete[newest]}' was saved in Hugging Face's format; name a step that was not")
        return complete[newest], [there[number] for number in sorted(there, reverse=True) if number > newest]
    if there:
        step = there[max(there)]
        raise UserError(f"'{step}' has no {METADATA}: its saving was cut off, and no older step is complete")
    if re.fullmatch(_STEP, checkpoint.name):
        raise UserError(f"'{checkpoint}' has no {METADATA}: its saving was cut off; name another step")
    raise UserError(f"'{checkpoint}' holds no step-N folder; name <dump_folder>/checkpoint or one step of it")


def set_aside_incomplete(checkpoint: Path) -> Path | None:
    """Move a checkpoint folder that is empty, or holds nothing but steps whose saving was cut off, out of the way.

    TorchTitan loads initial weights only where there is no checkpoint folder at all. A run that was killed while it
    saved its first step, or whose steps were removed, would otherwise start anew from random ones.

    Returns:
        Where to, or None where there is no folder or it has a complete step.

    Raises:
        UserError: the folder holds something else, or cannot be moved.
    """
    if not checkpoint.is_dir() or complete_steps(checkpoint):
        return None
    problem = f"'{checkpoint}' has no complete step to go on from, and initial weights are loaded only where it is not"
    others = [path.name for path in checkpoint.iterdir() if not re.fullmatch(_STEP, path.name)]
    if others or checkpoint.is_symlink():
        what = f"holds '{sorted(others)[0]}'" if others else "is a link"
        raise UserError(f"{problem}; as it {what}, it is left alone: move it, or choose another checkpoint.folder")
    try:
        return checkpoint.rename(_unused(f"{checkpoint}.incomplete"))
    except OSError as error:
        raise UserError(f"{problem}; it cannot be moved ({error.strerror}): remove it") from error


def set_aside_later(checkpoint: Path, step: int) -> Path | None:
    """Move the complete steps after ``step`` out of a checkpoint folder, for a run that continues from ``step``.

    By their numbers TorchTitan would keep them in place of the run's new steps, and load them at its next start.

    Returns:
        Where to, or None where there are none.

    Raises:
        UserError: they cannot be moved.
    """
    later = [path for number, path in complete_steps(checkpoint).items() if number > step]
    if not later:
        return None
    aside = _unused(f"{checkpoint}.after-step-{step}")
    try:
        aside.mkdir()
        for path in later:
            path.rename(aside / path.name)
    except OSError as error:
        raise UserError(
            f"the steps after {step} in '{checkpoint}' cannot be moved ({error.strerror}); move them"
        ) from error
    return aside


def _unused(name: str) -> Path:
    return next(path for number in count() if not (path := Path(f"{name}-{number}")).exists())


def complete_steps(checkpoint: Path) -> dict[int, Path]:
    """The steps that were saved to their end, by number.

    Raises:
        UserError: a folder that TorchTitan would take for another step than its name says.
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
    """Whether a complete step is a distributed checkpoint; a last save may be weights in Hugging Face's format."""
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
    """The weights of a model of shape ``args`` from one step, in the precision they were saved in.

    Weights-only and full checkpoints look alike here: optimizer and loader states are not returned.

    Args:
        verify: compare the checksums of the whole step.

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
            raise UserError(f"'{step}' lacks the weight '{name}'; it is no checkpoint of this model")
        if saved.size != tensor.shape:
            raise UserError(
                f"'{step}' has '{name}' of shape {tuple(saved.size)}, but the run's model needs "
                f"{tuple(tensor.shape)}; vocabulary, num_quantizers or shape are of another run"
            )
        state[name] = torch.empty(saved.size, dtype=saved.properties.dtype)
    try:
        dcp.load(state, storage_reader=CheckedReader(step, verify=False), no_dist=True)
    except (CheckpointException, RuntimeError, OSError, EOFError) as error:
        raise UserError(f"'{step}' is damaged and cannot be read: {_last_line(error)}") from error
    for name, tensor in state.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"'{step}' has NaN or infinite values in '{name}'; use an earlier step")
    return state


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
