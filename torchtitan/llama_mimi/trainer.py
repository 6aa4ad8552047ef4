"""TorchTitan's `Trainer` for the models of this package. Without a GPU, the trainer uses the CPU."""

import os

# The number of targets differs in each step, which could fragment the memory of a GPU. PyTorch reads these variables
# once, so set them before its import.
if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"} & os.environ.keys():
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"

from llama_mimi.common.cpu import use_cpu_without_gpu

use_cpu_without_gpu()  # before anything imports TorchTitan

from torchtitan.train import Trainer  # noqa: E402, F401

import llama_mimi.train_spec  # noqa: E402, F401  (registers the model, also for a config without custom_import)
