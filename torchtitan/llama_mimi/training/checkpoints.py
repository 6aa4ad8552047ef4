"""Extension of TorchTitan's checkpoint manager: checksums, and short messages about full disks and damaged files."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torchtitan.components.checkpoint as engine
from torch.distributed.checkpoint.api import CheckpointException

from llama_mimi.checkpoint.dcp import complete_steps, load_step
from llama_mimi.checkpoint.storage import CheckedWriter, first_failure
from llama_mimi.common.errors import UserError

_save_of_engine, _load_of_engine = engine.CheckpointManager.save, engine.CheckpointManager.load


def use_checksums(verify: bool) -> None:
    """Make TorchTitan's checkpoint manager write checksums. With ``verify``, check files before they are loaded."""

    # For DCP, the manager passes a path. For the Hugging Face format, it passes a writer or a reader, and no path.
    def save(of_dcp: Callable, state: Any, *, storage_writer: Any, checkpoint_id: str | None, **settings: Any) -> Any:
        writer = CheckedWriter(checkpoint_id) if checkpoint_id else storage_writer
        return of_dcp(state, storage_writer=writer, **settings)

    def load(state: Any, *, storage_reader: Any = None, checkpoint_id: str | None = None) -> None:
        if checkpoint_id is None:
            dcp.load(state, storage_reader=storage_reader)
        else:
            load_step(state, Path(checkpoint_id), verify)

    engine.dcp = SimpleNamespace(save=partial(save, dcp.save), async_save=partial(save, dcp.async_save), load=load)
    engine.CheckpointManager.save, engine.CheckpointManager.load = _save, _load


def _load(manager: Any, step: int = -1) -> bool:
    """Load a step, then prepare the validator, which needs the loaded step and weights."""
    is_loaded = _load_of_engine(manager, step)
    trainer = manager.states["train_state"]
    if trainer.job_config.validation.enable:
        trainer.validator.begin(trainer)
    return is_loaded


def _save(manager: Any, curr_step: int, last_step: bool = False) -> None:
    settings = manager.states["train_state"].job_config.validation
    can_stop = settings.enable and settings.patience and curr_step % settings.freq == 0
    is_end = (last_step or can_stop) and manager._should_save(curr_step, last_step)
    try:
        _save_of_engine(manager, curr_step, last_step)
        if is_end:
            manager._async_wait()  # the checkpoint must be complete when the run ends
    except CheckpointException as error:
        folder = Path(manager.folder)
        if dist.get_rank() == 0:  # remove the incomplete step, because it fills the disk
            for path in set(folder.glob("step-*")) - set(complete_steps(folder).values()):
                shutil.rmtree(path, ignore_errors=True)
        failure = first_failure(error)
        raise (failure if isinstance(failure, UserError | OSError) else error) from None
    # TorchTitan does not purge after the last save, and purges asynchronous saves before they are complete.
    if is_end and (last_step or manager.async_mode != engine.AsyncMode.DISABLED):
        manager._purge_stale_checkpoints()
