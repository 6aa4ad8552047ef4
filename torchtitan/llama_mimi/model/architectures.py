"""The two architectures behind one pair of functions: what TorchTitan builds, and how it is spread over devices."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torchtitan.distributed import ParallelDims

from llama_mimi.model.hierarchical import HierarchicalLlamaMimi, parallelize_hierarchical
from llama_mimi.model.llama import LlamaMimi, LlamaMimiArgs, parallelize_flattened
from llama_mimi.tokens.units import Architecture


@dataclass(frozen=True)
class Parts:
    model: type[LlamaMimi]
    parallelize: Callable[[Any, ParallelDims, Any], nn.Module]


ARCHITECTURES: dict[Architecture, Parts] = {
    "flattened": Parts(LlamaMimi, parallelize_flattened),
    "hierarchical": Parts(HierarchicalLlamaMimi, parallelize_hierarchical),
}


def build_model(args: LlamaMimiArgs) -> LlamaMimi:
    return ARCHITECTURES[args.architecture].model(args)


def parallelize(model: LlamaMimi, parallel_dims: ParallelDims, job_config: Any) -> nn.Module:
    """TorchTitan's plan for a Llama, with what the loss, gloo and the architecture need.

    Raises:
        UserError: packed rows cannot be compiled here.
    """
    return ARCHITECTURES[model.model_args.architecture].parallelize(model, parallel_dims, job_config)
