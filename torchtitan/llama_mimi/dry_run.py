"""Implementation of scripts/dry_run.py: simulate one GPU's part of a training step, with fake tensors."""

import contextlib
import copy
import logging
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from llama_mimi.trainer import Trainer  # first: it chooses the device before anything imports TorchTitan

# isort: split
import torch
from torch import nn
from torch._subclasses.fake_impls import op_implementations_dict
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import _disable_current_modes
from torchtitan.components.optimizer import build_optimizers
from torchtitan.components.quantization import float8
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import utils as dist_utils
from torchtitan.models.attention import VarlenAttentionWrapper, VarlenMetadata
from torchtitan.models.llama3.model.model import Attention, TransformerBlock
from torchtitan.protocols.model_converter import build_model_converters
from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.tools.logging import init_logger, logger
from torchtitan.tools.utils import set_default_dtype
from tqdm import tqdm

import llama_mimi.train_spec  # registers the model
from llama_mimi.checkpoint.stand_ins import write_missing
from llama_mimi.common.errors import UserError
from llama_mimi.model.hierarchical import HierarchicalLlamaMimi
from llama_mimi.training.config_file import parse_config

DEVICE = torch.device("cpu")  # cuda would need a driver, for FSDP's streams and the autograd engine
compute_shape = ShardingPropagator._propagate_tensor_meta_non_cached


def untracked_shape(*args: Any) -> Any:
    """Compute a DTensor's shape outside the memory tracker, because the tracker would count unsharded tensors."""
    with _disable_current_modes():
        return compute_shape(*args)


class HalfPrecisionAttention(nn.Module):
    """Attention with the GPU operator, because activation checkpointing does not support the CPU operator."""

    def forward(self, q_BHLD: torch.Tensor, k_BGLD: torch.Tensor, v_BGLD: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.ops.aten._scaled_dot_product_flash_attention(q_BHLD, k_BGLD, v_BGLD, is_causal=True)[0]


def nonzero(mode: FakeTensorMode, func: Callable, condition: torch.Tensor) -> torch.Tensor:
    """Treat every element as nonzero, so that the dry run uses the maximum number of targets."""
    return condition.new_empty((condition.numel(), condition.ndim), dtype=torch.long)


class FusedRMSNorm(torch.autograd.Function):
    """RMSNorm that keeps the same tensors for the backward pass as on a GPU. The CPU operator keeps more tensors."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, shape: list[int], weight: torch.Tensor, eps: float) -> torch.Tensor:
        ctx.save_for_backward(x, weight, x[..., :1].float())
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor, None]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None, torch.empty_like(weight), None


class TotalMemTracker(MemTracker):
    """Memory tracker without hooks on gradients, which frozen weights do not have. Only the total is used here."""

    def _track_module_params_and_buffers(self, module: nn.Module, install_grad_hooks: bool = False) -> tuple[int, int]:
        return super()._track_module_params_and_buffers(module, install_grad_hooks=False)


def deep_frames(model: HierarchicalLlamaMimi, targets_NQ: torch.Tensor) -> torch.Tensor:
    """Return fake frames for the depth decoder: as many frames as one training step uses on average."""
    return targets_NQ.new_empty(math.ceil(model.model_args.depth_train_fraction * len(targets_NQ)))


@contextlib.contextmanager
def no_content() -> Iterator[None]:
    """Use fake tensors and the operators of a GPU, without compilation."""
    with (
        torch.compiler.set_stance("force_eager"),
        patch.object(nn.functional, "rms_norm", FusedRMSNorm.apply),
        patch.object(HierarchicalLlamaMimi, "deep_frames", deep_frames),
        patch.dict(op_implementations_dict, {torch.ops.aten.nonzero.default: nonzero}),
        FakeTensorMode(allow_non_fake_inputs=True),  # real tensors are allowed, because device meshes use them
    ):
        yield


def prepare(args: list[str], num_gpus: int) -> tuple[Any, ParallelDims]:
    """Check a config, and build the device meshes as rank 0 of a fake process group."""
    os.environ["WORLD_SIZE"] = str(num_gpus)
    job_config = parse_config(args)
    parallelism = job_config.parallelism
    if parallelism.context_parallel_degree > 1 or job_config.training.enable_cpu_offload:
        settings = "parallelism.context_parallel_degree, training.enable_cpu_offload"
        raise UserError(f"the dry run supports none of these settings: {settings}; remove them")
    job_config.compile.enable = False
    llama_mimi.train_spec.keep_output_matrix(job_config)
    torch.distributed.init_process_group("fake", rank=0, world_size=num_gpus)
    parallel_dims = Trainer.init_distributed(SimpleNamespace(job_config=job_config))
    parallel_dims.build_mesh()
    return job_config, parallel_dims


def build_model(job_config: Any, parallel_dims: ParallelDims) -> nn.Module:
    """Build this rank's part of the model on the meta device, with the attention operators of a GPU."""
    train_spec = get_train_spec(job_config.model.name)
    args = copy.copy(train_spec.model_args[job_config.model.flavor])
    args.update_from_config(job_config)
    with torch.device("meta"), set_default_dtype(TORCH_DTYPE_MAP[job_config.training.dtype]):
        model = train_spec.model_cls(args)
    with patch.object(float8, "has_cuda_capability", lambda *capability: True):  # TorchTitan refuses float8 on a CPU
        build_model_converters(job_config, parallel_dims).convert(model)
    is_half = "float32" not in (job_config.training.mixed_precision_param, "")
    for attention in (module for module in model.modules() if isinstance(module, Attention)):
        if attention.attn_type == "sdpa" and not is_half:
            attention.inner_attention.sdpa_backends = [SDPBackend.MATH]  # GPUs have no other backend for float32
        elif is_half:
            is_varlen = attention.attn_type == "varlen"
            attention.inner_attention = VarlenAttentionWrapper() if is_varlen else HalfPrecisionAttention()
    return train_spec.parallelize_fn(model, parallel_dims, job_config)


def make_batch(job_config: Any) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Return inputs, labels and the other arguments of the model."""
    B, L = job_config.training.local_batch_size, job_config.training.seq_len
    tokenizer = llama_mimi.train_spec.build_speech_tokenizer(job_config)
    ids_BLW = torch.zeros(B, L, tokenizer.ids_per_position, dtype=torch.long, device=DEVICE)
    inputs, labels = tokenizer.batch(ids_BLW, torch.zeros_like(ids_BLW), ids_BLW[..., 0])
    tokens = inputs.pop("input")
    if job_config.data.packing == "pack":
        bounds = torch.zeros(B + 1, dtype=torch.int32, device=DEVICE)  # bounds of clips; they need only a few bytes
        inputs["attention_masks"] = VarlenMetadata(cu_seq_q=bounds, cu_seq_k=bounds, max_q=L, max_k=L)
        inputs["positions"] = torch.zeros(B, L, dtype=torch.long, device=DEVICE)
    return tokens, labels, inputs


def build_states(job_config: Any, parallel_dims: ParallelDims, model: nn.Module) -> tuple[Any, dict[str, int]]:
    """Allocate the model, an optimizer and its states; return the optimizer, and the bytes of each kind of tensor."""
    model.to_empty(device=DEVICE)
    # TorchTitan's optimizers, because the optimizers of the train spec read the values of gradients.
    optimizers = build_optimizers([model], job_config.optimizer, parallel_dims)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizers.step()
    states = [tensor for own in optimizers for state in own.state.values() for tensor in state.values()]
    tensors = {"parameters": list(model.parameters()), "optimizer states": states}
    tensors["gradients"] = [parameter.grad for parameter in trained]
    optimizers.zero_grad()
    local = {name: [t.to_local() if isinstance(t, DTensor) else t for t in own] for name, own in tensors.items()}
    return optimizers, {name: sum(shard.nbytes for shard in shards) for name, shards in local.items()}


def measure(job_config: Any, parallel_dims: ParallelDims, model: nn.Module) -> dict[str, int]:
    """Take one training step without compilation; return the bytes of each kind of tensor, and the peak in bytes."""
    optimizers, sizes = build_states(job_config, parallel_dims, model)
    loss_fn = get_train_spec(job_config.model.name).build_loss_fn(job_config, parallel_dims=parallel_dims)
    has_loss_parallel = parallel_dims.tp_enabled and not job_config.parallelism.disable_loss_parallel
    train_context = dist_utils.get_train_context(has_loss_parallel)
    amp = dist_utils.maybe_enable_amp(parallel_dims, job_config.training.mixed_precision_param, DEVICE.type)
    inputs, labels, extra = make_batch(job_config)
    per_pass = job_config.training.local_batch_size * parallel_dims.dp_replicate * parallel_dims.dp_shard
    num_passes = max(1, job_config.training.global_batch_size // per_pass)  # forward and backward passes of a step
    num_passes = min(2, num_passes)  # from the second pass on, the gradients are in memory, too
    blocks = [module for module in model.modules() if isinstance(module, TransformerBlock)]
    progress = tqdm(total=2 * len(blocks) * num_passes, desc="forward and backward", unit="block", delay=2)

    def count_block(*args: Any) -> None:
        progress.update()

    def count_both(block: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        if torch._C._current_graph_task_id() == -1:  # not recomputed in a backward pass
            count_block()
            output.register_hook(count_block)

    for block in blocks:
        block.register_forward_hook(count_both)
    tracker = TotalMemTracker()
    tracker.track_external(model, *optimizers, inputs, labels)
    with patch.object(ShardingPropagator, "_propagate_tensor_meta_non_cached", untracked_shape), tracker:
        for _ in range(num_passes):
            with train_context():
                with amp:
                    pred = model(inputs, **extra)
                    loss = loss_fn(pred, labels) / torch.ones((), device=DEVICE)
                del pred
                loss.backward()
            tracker.reset_mod_stats()
        dist_utils.clip_grad_norm_(list(model.parameters()), job_config.training.max_norm, foreach=True)
        optimizers.step()
    progress.close()
    peak = tracker.get_tracker_snapshot("peak")[DEVICE]["Total"]
    return {**sizes, "activations, gathered weights, loss": peak - sum(sizes.values()), "peak": peak}


def dry_run(num_gpus: int, gpu_gb: float, args: list[str]) -> None:
    """Print the model, its meshes and the memory that a GPU needs; exit with code 1 if it exceeds ``gpu_gb`` GB."""
    init_logger()
    logger.setLevel(logging.ERROR)  # do not warn about missing folders
    job_config, parallel_dims = prepare(args, num_gpus)
    with tempfile.TemporaryDirectory() as folder:
        write_missing(job_config, Path(folder))
        model = build_model(job_config, parallel_dims)
        with no_content():
            memory = measure(job_config, parallel_dims, model)
        vocab_size = llama_mimi.train_spec.build_speech_tokenizer(job_config).vocabulary.size
    meshes = parallel_dims.get_all_one_dimensional_meshes().items()
    rows = {
        "model": f"{job_config.model.flavor}, {vocab_size:,} vocabulary entries",
        "meshes": ", ".join(f"{name} {mesh.size()}" for name, mesh in meshes) or "none",
    } | {name: f"{num_bytes / 1e9:,.3f} GB" for name, num_bytes in memory.items()}
    print("| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items()), sep="\n")
    torch.distributed.destroy_process_group()
    needs = f"a GPU needs {memory['peak'] / 1e9:,.2f} GB, and training may use {gpu_gb:g} GB"
    if memory["peak"] <= gpu_gb * 1e9:
        return print(f"fits: {needs}")
    remedy = "lower training.local_batch_size, set activation_checkpoint.mode to 'full', or use more GPUs"
    print(f"does not fit: {needs}; {remedy}")
    sys.exit(1)
