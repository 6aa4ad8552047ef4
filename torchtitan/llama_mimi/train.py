"""Train a model with TorchTitan's trainer, on GPUs or CPUs.

uv run torchrun --standalone --nproc_per_node=2 -m llama_mimi.train --job.config_file config/tiny.toml
"""

import logging
import os
import sys
from contextlib import suppress
from pathlib import Path

import tyro

from llama_mimi.common.command_line import is_first_rank, print_loading, print_next, report_errors
from llama_mimi.common.errors import UserError
from llama_mimi.job_config import JobConfig, checkpoint_folder

HELP = f"""{__doc__}
These are the settings of this project, and the settings of TorchTitan for which this project has other defaults. A
config file (--job.config_file) contains the same settings, in sections. The next command lists TorchTitan's other
settings. It takes 10 s.

    uv run python -m torchtitan.train --help
"""


@report_errors()
def main() -> None:
    """Train a model. Close checkpoints and metrics even if training fails."""
    if {"-h", "--help"} & {*sys.argv[1:]}:
        settings = tyro.conf.DisallowNone[JobConfig]
        tyro.cli(settings, prog="llama_mimi.train", description=HELP, args=["--help"], use_underscores=True)
    print_loading("PyTorch and TorchTitan")
    from llama_mimi.trainer import Trainer  # isort: skip  (first: it chooses the device)
    import torch
    from torchtitan.tools.logging import init_logger, logger

    from llama_mimi.common.distributed import end_with_torchrun, report_error_once
    from llama_mimi.training.config_file import parse_config
    from llama_mimi.training.log import hide_noise

    end_with_torchrun()
    init_logger()
    hide_noise()
    if not is_first_rank():
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
            if isinstance(error, OSError) and error.filename is None:  # TensorBoard does not set the file name
                error.filename = job_config.job.dump_folder
            with suppress(OSError):  # on a full disk, closing fails, too; report the first error
                trainer.close()
            raise
        trainer.close()
    torch.distributed.destroy_process_group()
    if is_first_rank() and job_config.checkpoint.enable and not job_config.checkpoint.last_save_in_hf:
        checkpoint = checkpoint_folder(job_config)
        print(f"written to {checkpoint}")
        output = Path("models", checkpoint.parent.resolve().name)
        if job_config.validation.enable and job_config.validation.patience and (step := trainer.validator.best_step):
            print(f"the validation loss is lowest at step {step}")
            checkpoint /= f"step-{step}"
        print_next("python scripts/convert_dcp_to_hf.py", checkpoint=checkpoint, output_dir=output)


if __name__ == "__main__":
    main()
