"""TorchTitan's checkpoint manager with checksums, and with one sentence for a full disk or a damaged file."""

import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torchtitan.components.checkpoint as engine
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse

from llama_mimi.checkpoint.dcp import name_last_good
from llama_mimi.checkpoint.storage import METADATA, CheckedReader, CheckedWriter, PlainLoadPlanner
from llama_mimi.common.errors import UserError, first_line
from llama_mimi.common.ranks import from_first

_save_of_engine = engine.CheckpointManager.save


def use_checksums(verify: bool) -> None:
    """Let TorchTitan's checkpoint manager write checksums, and compare them on loading if ``verify`` is set.

    The manager passes a path to DCP, so its three DCP functions are replaced.
    """
    engine.dcp = SimpleNamespace(save=_save, async_save=_async_save, load=partial(_load, verify))
    engine.CheckpointManager.save = _save_and_purge


def _save_and_purge(manager: Any, curr_step: int, last_step: bool = False) -> None:
    try:
        _save_of_engine(manager, curr_step, last_step)
    except CheckpointException as error:
        failure = _first_failure(error)
        raise (failure if isinstance(failure, UserError | OSError) else error) from None
    if last_step and manager._should_save(curr_step, last_step):
        manager._purge_stale_checkpoints()  # TorchTitan does not after the last save


def _save(state_dict: Any, *, storage_writer: Any, checkpoint_id: str | None) -> Any:
    if checkpoint_id is None:  # weights in Hugging Face's format
        return dcp.save(state_dict, storage_writer=storage_writer)
    try:
        return dcp.save(state_dict, storage_writer=CheckedWriter(checkpoint_id))
    except CheckpointException:
        _remove_incomplete(Path(checkpoint_id))
        raise


def _async_save(state_dict: Any, *, storage_writer: Any, checkpoint_id: str, **settings: Any) -> Any:
    response = dcp.async_save(state_dict, storage_writer=CheckedWriter(checkpoint_id), **settings)
    upload = response.upload_completion if isinstance(response, AsyncSaveResponse) else response
    upload.add_done_callback(lambda done: _remove_incomplete(Path(checkpoint_id)) if done.exception() else None)
    return response


def _load(verify: bool, state_dict: Any, *, storage_reader: Any = None, checkpoint_id: str | None = None) -> None:
    if checkpoint_id is None:
        return dcp.load(state_dict, storage_reader=storage_reader)
    step = Path(checkpoint_id)
    try:
        return dcp.load(state_dict, storage_reader=CheckedReader(step, verify), planner=PlainLoadPlanner())
    except CheckpointException as error:
        failure = _first_failure(error)
        if not isinstance(failure, UserError):
            if error.args[0] == "plan":
                raise UserError(f"'{step}' does not fit this run ({first_line(failure)}); change the config") from error
            failure = UserError(f"'{step}' cannot be read ({first_line(failure)})")
        raise from_first(lambda: name_last_good(failure, step)) from error


def _remove_incomplete(step: Path) -> None:
    """Remove a step that could not be written: it would fill the disk, and nothing can be read from it."""
    if dist.get_rank() == 0 and not (step / METADATA).exists():
        shutil.rmtree(step, ignore_errors=True)


def _first_failure(error: CheckpointException) -> BaseException:
    failures = [failure for failure, _ in error.failures.values()]
    return next((failure for failure in failures if isinstance(failure, UserError)), failures[0])
