"""The two architectures behind one pair of functions: TorchTitan's model, and its plan for many devices."""

from typing import Any

from torch import nn
from torchtitan.distributed import ParallelDims

from llama_mimi.model.hierarchical import HierarchicalLlamaMimi, prepare_depth_decoder
from llama_mimi.model.llama import LlamaMimi, LlamaMimiArgs, parallelize_llama_mimi


def build_model(args: LlamaMimiArgs) -> LlamaMimi:
    return HierarchicalLlamaMimi(args) if args.architecture == "hierarchical" else LlamaMimi(args)


def parallelize(model: LlamaMimi, parallel_dims: ParallelDims, job_config: Any) -> nn.Module:
    """Apply TorchTitan's plan for a Llama, and what the loss, gloo and the architecture need.

    Raises:
        UserError: packed rows cannot be compiled here.
    """
    if isinstance(model, HierarchicalLlamaMimi):
        prepare_depth_decoder(model.depth, job_config)
    return parallelize_llama_mimi(model, parallel_dims, job_config)
