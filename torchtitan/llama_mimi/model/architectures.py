"""The two architectures behind one pair of functions: what TorchTitan builds, and how it is spread over devices."""

from collections.abc import Callable
from typing import Any

from torch import nn
from torchtitan.distributed import ParallelDims

from llama_mimi.model.hierarchical import HierarchicalLlamaMimi, parallelize_hierarchical
from llama_mimi.model.llama import LlamaMimi, LlamaMimiArgs, parallelize_flattened
from llama_mimi.tokens.units import Architecture

# The model, and the function that spreads it over devices.
ARCHITECTURES: dict[Architecture, tuple[type[LlamaMimi], Callable[[Any, ParallelDims, Any], nn.Module]]] = {
    "flattened": (LlamaMimi, parallelize_flattened),
    "hierarchical": (HierarchicalLlamaMimi, parallelize_hierarchical),
}


def build_model(args: LlamaMimiArgs) -> LlamaMimi:
    model, _ = ARCHITECTURES[args.architecture]
    return model(args)


def parallelize(model: LlamaMimi, parallel_dims: ParallelDims, job_config: Any) -> nn.Module:
    """Apply TorchTitan's plan for a Llama, with what the loss, gloo and the architecture need.

    Raises:
        UserError: packed rows cannot be compiled here.
    """
    _, parallelize_model = ARCHITECTURES[model.model_args.architecture]
    return parallelize_model(model, parallel_dims, job_config)
