"""Build a model of either architecture, and distribute it over devices."""

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
    """Apply TorchTitan's plan for a Llama; raise a `UserError` if packed rows cannot be compiled here."""
    # TorchTitan computes in lower precision under FSDP, and on one device alone.
    is_mixed = job_config.training.mixed_precision_param != "float32" and (
        parallel_dims.fsdp_enabled or parallel_dims.world_size == 1
    )
    is_compiled = job_config.compile.enable and "model" in job_config.compile.components
    if model.model_args.attn_type == "varlen" and is_compiled and not (torch.cuda.is_available() and is_mixed):
        raise UserError(
            "compile.enable compiles the model, but packed rows in float32 or without a GPU are attended clip by clip, "
            "which cannot be compiled; set --compile.components loss, or data.packing to 'pad'"
        )
    if isinstance(model, HierarchicalLlamaMimi):
        prepare_depth_decoder(model.depth, job_config)
    model = parallelize_llama(model, parallel_dims, job_config)
    output = model.tok_embeddings if model.is_tied else model.output
    if isinstance(output, FSDPModule):  # the loss needs the matrix, so it stays gathered
        output.set_reshard_after_forward(False)
    if not torch.cuda.is_available():
        for module in model.modules():
            if isinstance(module, FSDPModule):  # gloo lacks the pre-multiplied sum with which FSDP2 divides gradients
                module.set_force_sum_reduction_for_comms(True)
    return model
