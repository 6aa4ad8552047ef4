"""Check the settings and meshes of a config without a GPU, and print the memory that each GPU would need.

    uv run python scripts/dry_run.py --num_gpus 64 --job.config_file config/llama3_1_8b.toml

The script accepts all options of training. One process acts as rank 0 and trains one step on PyTorch's fake tensors.
If the model folder does not exist, the script uses the vocabulary of Llama 3 and Mimi.
"""

import os
from dataclasses import dataclass

from llama_mimi.common.command_line import command
from llama_mimi.common.errors import UserError


@dataclass
class Options:
    num_gpus: int  # total number of GPUs, over all nodes
    # memory that training may use on each GPU, in GB. CUDA, NCCL and fragmentation need about 5 GB more: for a GPU with
    # 85 GB (sold as "80 GB"), set 80
    gpu_gb: float = 80.0

    def __post_init__(self) -> None:
        if self.num_gpus < 1:
            raise UserError(f"--num_gpus is {self.num_gpus}; set --num_gpus to 1 or more")


if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # so that the result does not depend on the machine
    with command(Options, __doc__, return_unknown_args=True) as (options, flags):
        from llama_mimi.dry_run import dry_run

        dry_run(options.num_gpus, options.gpu_gb, flags)
