"""Reading the model out of a distributed checkpoint (DCP), in one process and without the trainer."""

import re
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from llama_mimi.errors import UserError
from llama_mimi.model import LlamaMimi, LlamaMimiArgs

_METADATA = ".metadata"
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
    if (checkpoint / _METADATA).is_file():
        return checkpoint, []
    numbered = [(int(m[1]), path) for path in checkpoint.iterdir() if (m := re.fullmatch(r"step-(\d+)", path.name))]
    steps = [path for _, path in sorted(numbered, reverse=True)]
    incomplete: list[Path] = []
    for step in steps:
        if (step / _METADATA).is_file():
            return step, incomplete
        incomplete.append(step)
    if incomplete:
        raise UserError(f"'{incomplete[0]}' has no {_METADATA}: its saving was cut off, and no older step is complete")
    if re.fullmatch(r"step-\d+", checkpoint.name):
        raise UserError(f"'{checkpoint}' has no {_METADATA}: its saving was cut off; name another step")
    raise UserError(f"'{checkpoint}' holds no step-N folder; name <dump_folder>/checkpoint or one step of it")


def set_aside_incomplete(checkpoint: Path) -> Path | None:
    """Move a checkpoint folder without any complete step out of the way, and say where to.

    TorchTitan loads initial weights only where there is no checkpoint folder at all. A run that was killed while it
    saved its first step, or whose steps were removed, would otherwise start anew from random ones.
    """
    if not checkpoint.is_dir() or complete_steps(checkpoint):
        return None
    number = len(list(checkpoint.parent.glob(f"{checkpoint.name}.incomplete-*")))
    return checkpoint.rename(checkpoint.with_name(f"{checkpoint.name}.incomplete-{number}"))


def complete_steps(checkpoint: Path) -> dict[int, Path]:
    """The steps that were saved to their end, by number, as TorchTitan tells them (`CheckpointManager`)."""
    return {
        int(match[1]): step
        for step in checkpoint.glob("step-*")
        if (match := re.fullmatch(r"step-(\d+)", step.name))
        and any((step / name).is_file() for name in (_METADATA, _HF_INDEX))
    }


def has_loader_position(step: Path) -> bool:
    """Whether a step can be resumed; one that holds weights only cannot."""
    if not (step / _METADATA).is_file():
        return False
    return "dataloader.position" in _read_metadata(step).state_dict_metadata


def load_model_state(step: Path, args: LlamaMimiArgs) -> dict[str, torch.Tensor]:
    """The weights of a model of shape ``args`` from one step, in the precision they were saved in.

    Weights-only and full checkpoints look alike here: optimizer and loader states are not read. DCP keeps its
    index in a pickle, so only checkpoints of your own runs should be read.

    Raises:
        UserError: files are damaged or missing, or the weights are not those of ``args``.
    """
    metadata = _read_metadata(step)
    _check_files(step, metadata)
    with torch.device("meta"):
        expected = LlamaMimi(args).state_dict()
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
        dcp.load(state, storage_reader=FileSystemReader(step), no_dist=True)
    except (CheckpointException, RuntimeError, OSError, EOFError) as error:
        raise UserError(f"'{step}' is damaged and cannot be read: {_last_line(error)}") from error
    for name, tensor in state.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"'{step}' has NaN or infinite values in '{name}'; use an earlier step")
    return state


def _read_metadata(step: Path) -> Metadata:
    try:
        return FileSystemReader(step).read_metadata()
    except Exception as error:  # a damaged pickle raises whatever its bytes spell
        raise UserError(f"'{step / _METADATA}' is damaged ({_last_line(error)}); use another step") from error


def _check_files(step: Path, metadata: Metadata) -> None:
    """Every file the index points into is there, and long enough."""
    needed: dict[str, int] = {}
    for info in (metadata.storage_data or {}).values():
        needed[info.relative_path] = max(needed.get(info.relative_path, 0), info.offset + info.length)
    for name, num_bytes in needed.items():
        path = step / name
        if not path.is_file():
            raise UserError(f"'{path}' is missing: the checkpoint is incomplete; copy it anew or use another step")
        if path.stat().st_size < num_bytes:
            raise UserError(
                f"'{path}' has {path.stat().st_size:,} of {num_bytes:,} bytes: the checkpoint is truncated; "
                "copy it anew or use another step"
            )


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
