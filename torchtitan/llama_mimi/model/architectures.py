"""Functions that build a flattened or hierarchical model and distribute the model over devices."""

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torchtitan.distributed import ParallelDims
from torchtitan.models.llama3 import parallelize_llama

from llama_mimi.common.errors import UserError
from llama_mimi.model.hierarchical import HierarchicalLlamaMimi, prepare_depth_decoder
from llama_mimi.model.llama import LlamaMimi, LlamaMimiArgs


def build_model(args: LlamaMimiArgs) -> LlamaMimi:
    return HierarchicalLlamaMimi(args) if args.architecture == "hierarchical" else LlamaMimi(args)


def parallelize(model: LlamaMimi, parallel_dims: ParallelDims, job_config: Any) -> nn.Module:
    """Apply TorchTitan's parallelism for Llama 3; raise a `UserError` if packed attention cannot be compiled."""
    is_compiled = job_config.compile.enable and "model" in job_config.compile.components
    # TorchTitan computes in lower precision only under FSDP or on a single device.
    is_mixed = parallel_dims.fsdp_enabled or parallel_dims.world_size == 1
    has_kernel = torch.cuda.is_available() and is_mixed and job_config.training.mixed_precision_param != "float32"
    if model.model_args.attn_type == "varlen" and is_compiled and not has_kernel:
        raise UserError(
            "compile.enable is true, but attention over packed sequences can be compiled only on a GPU in bfloat16; "
            "use --compile.components loss, or set data.packing to 'pad'"
        )
    if is_compiled:
        # Sizes that vary between steps are marked as dynamic. By default, other shapes in validation or in the depth
        # decoder, whose blocks share code with the backbone, would make all sizes dynamic.
        torch._dynamo.config.automatic_dynamic_shapes = False
    if isinstance(model, HierarchicalLlamaMimi):
        prepare_depth_decoder(model.depth, job_config)
    model = parallelize_llama(model, parallel_dims, job_config)
    if isinstance(output := model.output_layer, FSDPModule):  # the loss reads this matrix, so keep it gathered
        output.set_reshard_after_forward(False)
    if not torch.cuda.is_available():
        for module in model.modules():
            if isinstance(module, FSDPModule):  # by default, FSDP2 needs an operation that gloo does not support
                module.set_force_sum_reduction_for_comms(True)
    return model
