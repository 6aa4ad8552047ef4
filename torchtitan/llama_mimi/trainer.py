"""TorchTitan's `Trainer` for the models of this package. Without a GPU, the trainer uses the CPU."""

from llama_mimi.common.cpu import use_cpu_without_gpu

use_cpu_without_gpu()  # before anything imports TorchTitan

from torchtitan.train import Trainer  # noqa: E402, F401

import llama_mimi.train_spec  # noqa: E402, F401  (registers the model, also for a config without custom_import)
