"""What is done before a run, whichever entry point starts it: checks, a lock, and a folder moved aside."""

import json
import socket
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torchtitan.tools.logging import logger

from llama_mimi.checkpoint.dcp import complete_steps, set_aside_incomplete, set_aside_later
from llama_mimi.common.errors import UserError
from llama_mimi.common.files import LOCK, locked, write_atomically
from llama_mimi.common.ranks import from_first
from llama_mimi.training.config_check import check_settings
from llama_mimi.training.file_check import check_files, checkpoint_folder

# Other nodes may see a change on a network file system a minute later (acdirmax of NFS).
SECONDS_FOR_NODES_TO_AGREE = 90
_held = ExitStack()  # locks of rank 0, until the process ends


def prepare_run(job_config: Any) -> None:
    """Check and prepare a run, whichever entry point starts it. Rank 0 does it, and the others wait.

    Settings and files are checked, job.dump_folder is locked, the config is saved in it, and a checkpoint folder that
    nothing can be loaded from is moved out of the way.

    Raises:
        UserError: on every rank what is wrong, such as another run in job.dump_folder or a full disk; on a node that
            sees other steps than the first one does, that.
    """
    checkpoint, settings = checkpoint_folder(job_config), job_config.checkpoint

    def steps() -> list[int] | None:
        return sorted(complete_steps(checkpoint)) if checkpoint.is_dir() else None

    def prepare() -> list[int] | None:
        check_settings(job_config, dist.get_world_size() if dist.is_initialized() else 1)
        check_files(job_config)
        folder = Path(job_config.job.dump_folder)
        _held.enter_context(locked(folder / LOCK, "job.dump_folder"))
        if name := job_config.job.save_config_file:
            write_atomically(str(folder), name, json.dumps(job_config.to_dict(), indent=2).encode())
        if settings.enable and settings.load_step != -1 and (aside := set_aside_later(checkpoint, settings.load_step)):
            logger.warning(f"the steps after {settings.load_step} in '{checkpoint}' were moved to '{aside}'")
        has_initial_weights = settings.initial_load_in_hf or settings.initial_load_path
        if settings.enable and has_initial_weights and (aside := set_aside_incomplete(checkpoint)):
            logger.warning(f"no step in '{checkpoint}' is complete, so it was moved to '{aside}'")
        return steps()

    of_first = from_first(prepare)
    # TorchTitan would go on with random weights where the folder is there without a step, and each node looks itself.
    deadline = time.monotonic() + SECONDS_FOR_NODES_TO_AGREE
    while settings.enable and steps() != of_first:
        if time.monotonic() > deadline:
            raise UserError(
                f"the steps in '{checkpoint}' are {steps()} on {socket.gethostname()}, but {of_first} on the first "
                "node; let all nodes see the same job.dump_folder"
            )
        time.sleep(1)
