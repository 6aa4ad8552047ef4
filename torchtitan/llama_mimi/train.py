"""Train a model with TorchTitan's trainer, on GPUs or CPUs.

uv run torchrun --standalone --nproc_per_node=2 -m llama_mimi.train --job.config_file config/tiny.toml
"""

import logging
import os
import sys
from contextlib import suppress

import torch

from llama_mimi.common.command_line import run_cli
from llama_mimi.common.cpu import use_cpu_without_gpu
from llama_mimi.common.errors import UserError

use_cpu_without_gpu()  # before anything imports TorchTitan

from torchtitan.tools.logging import init_logger, logger  # noqa: E402
from torchtitan.train import Trainer  # noqa: E402

import llama_mimi.train_spec  # noqa: E402, F401  (registers the model, also for a config without custom_import)
from llama_mimi.common.distributed import end_with_torchrun, report_error_once  # noqa: E402
from llama_mimi.training.config_file import parse_config  # noqa: E402


def main() -> None:
    """Train a model. Close checkpoints and metrics even if training fails."""
    end_with_torchrun()
    init_logger()
    if int(os.environ.get("RANK", 0)) > 0:
        logger.setLevel(logging.WARNING)  # all ranks log the same lines
    with report_error_once():
        job_config = parse_config(sys.argv[1:])
        if "LOCAL_RANK" not in os.environ:
            command = "torchrun --standalone --nproc_per_node=1 -m llama_mimi.train"
            raise UserError(f"LOCAL_RANK is not set: only torchrun can start training; run `{command} ...`")
        trainer = Trainer(job_config)
        try:
            trainer.train()
        except BaseException as error:
            if isinstance(error, OSError) and error.filename is None:  # TensorBoard does not set it
                error.filename = job_config.job.dump_folder
            with suppress(OSError):  # on a full disk, closing fails, too; report the first error
                trainer.close()
            raise
        trainer.close()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_cli(main)
