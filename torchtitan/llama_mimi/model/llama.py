"""TorchTitan's Llama 3, extended by tied weights (Llama-3.2-1B) and attention within a clip (packed rows)."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate
from torchtitan.distributed import ParallelDims
from torchtitan.models.attention import VarlenAttentionWrapper, VarlenMetadata
from torchtitan.models.llama3 import Transformer, TransformerModelArgs, parallelize_llama
from torchtitan.models.llama3.model.args import RoPEScalingArgs

from llama_mimi.common.errors import UserError
from llama_mimi.model.cross_entropy import PendingLogits, PendingOutput, pending_logits
from llama_mimi.tokens.sequences import load_sequences
from llama_mimi.tokens.units import Architecture, UnitVocabulary


@dataclass
class LlamaMimiArgs(TransformerModelArgs):
    """Llama 3 hyperparameters, and those that follow from the settings of a run.

    A flavour leaves ``vocab_size`` and the fields after ``depth`` to the tokenizer, the codec and the settings.

    Args:
        depth: shape of the hierarchical architecture's decoder over the levels of a frame.
        depth_share: fraction of the frames that train it.
    """

    enable_weight_tying: bool = False
    depth: "LlamaMimiArgs | None" = None
    architecture: Architecture = "flattened"
    num_quantizers: int = 0
    codebook_size: int = 0
    depth_share: float = 1.0

    @property
    def ffn_dim(self) -> int:
        """Width of the feed-forward layer, as TorchTitan derives it."""
        width = int(2 * 4 * self.dim / 3)
        if self.ffn_dim_multiplier is not None:
            width = int(self.ffn_dim_multiplier * width)
        return -(-width // self.multiple_of) * self.multiple_of

    def update_from_config(self, job_config: Any, **kwargs: Any) -> None:
        super().update_from_config(job_config, **kwargs)
        codec, model = job_config.codec, job_config.model
        sequences = load_sequences(
            model.hf_assets_path, codec.name, codec.num_quantizers, model.vocabulary, model.architecture
        )
        self.vocab_size = sequences.vocabulary.size
        self.num_quantizers, self.codebook_size = codec.num_quantizers, sequences.vocabulary.codebook_size
        self.architecture, self.depth_share = model.architecture, model.depth_share
        if self.architecture == "hierarchical":
            self.enable_weight_tying = False  # a matrix of its own predicts level 0
        if job_config.data.packing == "pack":
            self.attn_type, self.attn_mask_type = "varlen", "block_causal"

    @property
    def vocabulary(self) -> UnitVocabulary:
        base = self.vocab_size - self.codebook_size * self.num_quantizers - 2
        return UnitVocabulary(base, self.codebook_size, self.num_quantizers)

    @property
    def targets_per_frame(self) -> float:
        """Mean number of codes of a frame that the loss predicts."""
        share = self.depth_share if self.architecture == "hierarchical" else 1.0
        return 1 + share * (self.num_quantizers - 1)

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        """Return the number of parameters, and training FLOPs per target (`LlamaMimi.flops_per_target`)."""
        assert isinstance(model, LlamaMimi)
        return sum(p.numel() for p in model.parameters()), model.flops_per_target(seq_len)


def training_flops(num_weights: int, args: TransformerModelArgs, seq_len: int) -> int:
    """Return the FLOPs of a position, forward and backward: 6 for each weight in a product, plus attention."""
    return 6 * num_weights + 6 * args.n_layers * args.n_heads * 2 * (args.dim // args.n_heads) * seq_len


def num_weights(*modules: nn.Module | None) -> int:
    return sum(p.numel() for module in modules if module is not None for p in module.parameters())


class PackedAttention(VarlenAttentionWrapper):
    """Causal attention within each sequence of a packed row: TorchTitan's kernel where it runs, else clip by clip.

    On CPUs the second is 1 to 2.8 times as fast as a mask over the rows (scripts/benchmarks/LEDGER.md).
    """

    def forward(
        self, q_BHLD: torch.Tensor, k_BGLD: torch.Tensor, v_BGLD: torch.Tensor, sequences: VarlenMetadata
    ) -> torch.Tensor:
        """Return (B, L, H, D), or (B * L, H, D) from the kernel; H query heads share G key heads."""
        if q_BHLD.is_cuda and q_BHLD.dtype in (torch.bfloat16, torch.float16):
            return super().forward(q_BHLD, k_BGLD, v_BGLD, sequences)
        B, H, L, D = q_BHLD.shape
        lengths = sequences.cu_seq_q.diff().tolist()
        # All rows end to end, heads first: the gradient of a clip's slice then needs no zeros around it.
        clips = zip(*(x.transpose(0, 1).flatten(1, 2).split(lengths, 1) for x in (q_BHLD, k_BGLD, v_BGLD)), strict=True)
        outputs = [
            F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=len(q) != len(k))
            for q, k, v in clips
        ]
        return torch.cat(outputs, 2).view(H, B, L, D).permute(1, 2, 0, 3).contiguous()


class LlamaMimi(Transformer):
    """A Llama 3 decoder up to the logits, which the loss computes in chunks.

    With tied embeddings ``output`` is None, which TorchTitan's Transformer allows. With ``attn_type`` "varlen" rows
    hold several sequences, each of which begins where ``positions`` are 0.
    """

    def __init__(self, model_args: LlamaMimiArgs) -> None:
        super().__init__(model_args)
        self.is_tied = model_args.enable_weight_tying
        self.output = None if self.is_tied else PendingOutput(model_args.dim, model_args.vocab_size, bias=False)
        if model_args.attn_type == "varlen":
            for layer in self.layers.values():
                layer.attention.inner_attention = PackedAttention()

    def flops_per_target(self, seq_len: int) -> int:
        """Return the training FLOPs per target; looking up an embedding is not a product."""
        matrix = self.tok_embeddings if self.is_tied else self.output
        return training_flops(num_weights(self.layers, self.norm, matrix), self.model_args, seq_len)

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        super().init_weights(buffer_device)
        if self.is_tied:  # as Hugging Face draws embeddings: of unit variance, each token would predict itself
            nn.init.normal_(self.tok_embeddings.weight, std=0.02)

    def get_attention_masks(
        self, input_batch: torch.Tensor, tokenizer: Any, extra_inputs: dict[str, torch.Tensor] | None = None
    ) -> VarlenMetadata:
        """Return the bounds of the sequences of a batch, from ``positions`` (B, L) among its extra inputs.

        Raises:
            TypeError: the model takes no masks; TorchTitan's validator expects this type.
        """
        if self.model_args.attn_type != "varlen":
            raise TypeError("rows of one sequence need no mask")
        assert extra_inputs is not None
        positions_BL = extra_inputs["positions"]
        starts_N = (positions_BL.flatten() == 0).nonzero().flatten().to(torch.int32)
        bounds = F.pad(starts_N, (0, 1), value=positions_BL.numel())
        # An upper bound for every sequence; for the maximum itself the host would wait for the GPU.
        longest = positions_BL.shape[1]
        return VarlenMetadata(cu_seq_q=bounds, cu_seq_k=bounds, max_q=longest, max_k=longest)

    def forward(self, tokens: torch.Tensor, attention_masks: Any = None, positions: Any = None) -> PendingLogits:
        """Return the pending logits (B, L, V) of token ids (B, L)."""
        output = super().forward(tokens, attention_masks, positions)
        if not self.is_tied:
            return output
        if isinstance(output, DTensor):  # tensor parallel: positions are split
            output = output.redistribute(placements=[Replicate()])
        return pending_logits(output, self.tok_embeddings.weight)


def parallelize_llama_mimi(model: LlamaMimi, parallel_dims: ParallelDims, job_config: Any) -> nn.Module:
    """See `llama_mimi.model.architectures.parallelize`; the depth decoder is prepared before."""
    training, compilation = job_config.training, job_config.compile
    # TorchTitan computes in lower precision under FSDP, and on one device alone.
    is_mixed = training.mixed_precision_param != "float32" and (
        parallel_dims.fsdp_enabled or parallel_dims.world_size == 1
    )
    has_kernel = torch.cuda.is_available() and is_mixed
    is_compiled = compilation.enable and "model" in compilation.components
    if model.model_args.attn_type == "varlen" and is_compiled and not has_kernel:
        raise UserError(
            "compile.enable compiles the model, but packed rows in float32 or without a GPU are attended clip by clip, "
            "which cannot be compiled; set --compile.components loss, or data.packing to 'pad'"
        )
    model = parallelize_llama(model, parallel_dims, job_config)
    output = model.tok_embeddings if model.is_tied else model.output
    if isinstance(output, FSDPModule):  # the loss needs the matrix, so it stays gathered
        output.set_reshard_after_forward(False)
    if not torch.cuda.is_available():
        for module in model.modules():
            if isinstance(module, FSDPModule):  # gloo lacks the pre-multiplied sum with which FSDP2 divides gradients
                module.set_force_sum_reduction_for_comms(True)
    return model


def depth_args(*, dim: int, n_layers: int, n_heads: int, n_kv_heads: int, ffn_dim: int) -> LlamaMimiArgs:
    """Return the shape of a depth decoder, whose positions are the levels of a frame: too few to scale RoPE."""
    return LlamaMimiArgs(
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        # TorchTitan rounds a derived width up to multiple_of: this pair gives ffn_dim itself
        multiple_of=ffn_dim,
        ffn_dim_multiplier=ffn_dim / int(8 * dim / 3),
        rope_theta=500000,
        rope_scaling_args=RoPEScalingArgs(scaling_factor=1.0),
    )


LLAMA_3_2_ROPE = RoPEScalingArgs(32.0, 1.0, 4.0, 8192)
LLAMA_3_1_ROPE = RoPEScalingArgs(8.0, 1.0, 4.0, 8192)

FLAVORS = {
    "tiny": LlamaMimiArgs(
        dim=192,
        n_layers=4,
        n_heads=6,
        n_kv_heads=2,
        multiple_of=64,
        rope_theta=500000,
        rope_scaling_args=LLAMA_3_2_ROPE,
        enable_weight_tying=True,
        depth=depth_args(dim=96, n_layers=1, n_heads=3, n_kv_heads=1, ffn_dim=768),
    ),
    "1B": LlamaMimiArgs(  # Llama-3.2-1B
        dim=2048,
        n_layers=16,
        n_heads=32,
        n_kv_heads=8,
        ffn_dim_multiplier=1.5,
        multiple_of=256,
        rope_theta=500000,
        rope_scaling_args=LLAMA_3_2_ROPE,
        enable_weight_tying=True,
        depth=depth_args(dim=1024, n_layers=4, n_heads=8, n_kv_heads=2, ffn_dim=8192),  # as CSM-1B
    ),
    "8B": LlamaMimiArgs(  # Llama-3.1-8B
        dim=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        ffn_dim_multiplier=1.3,
        multiple_of=1024,
        rope_theta=500000,
        rope_scaling_args=LLAMA_3_1_ROPE,
        depth=depth_args(dim=2048, n_layers=8, n_heads=16, n_kv_heads=4, ffn_dim=16384),
    ),
}
