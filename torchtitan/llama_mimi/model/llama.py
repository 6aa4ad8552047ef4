"""TorchTitan's Llama 3 with two additions: tied embeddings, and attention within each clip of a packed sequence."""

import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor, Replicate
from torchtitan.models.attention import VarlenAttentionWrapper, VarlenMetadata
from torchtitan.models.llama3 import Transformer, TransformerModelArgs
from torchtitan.models.llama3.model.args import RoPEScalingArgs

from llama_mimi.common.choices import TEXT_TARGETS, Architecture
from llama_mimi.model.cross_entropy import LazyLogits, PendingOutput, output_matrix, pending_logits
from llama_mimi.model.lora import init_lora
from llama_mimi.tokens.tokenizer import build_speech_tokenizer
from llama_mimi.tokens.vocabulary import AudioVocabulary


@dataclass
class LlamaMimiArgs(TransformerModelArgs):
    """Hyperparameters of Llama 3. `update_from_config` sets ``vocab_size`` and the fields after ``depth``."""

    ffn_dim: int = 14336  # width of the feed-forward layers
    rope_theta: float = 500000
    enable_weight_tying: bool = False
    depth: "LlamaMimiArgs | None" = None  # depth decoder of the hierarchical architecture
    architecture: Architecture = "flattened"
    num_quantizers: int = 0
    codebook_size: int = 0
    depth_train_fraction: float = 1.0  # fraction of the frames that train the depth decoder
    predicts_text: bool = False  # a training task predicts text

    def __post_init__(self) -> None:
        # TorchTitan derives the width from `dim` and rounds it up; these values give `ffn_dim`.
        self.multiple_of, self.ffn_dim_multiplier = self.ffn_dim, self.ffn_dim / int(8 * self.dim / 3)

    def update_from_config(self, job_config: Any, **kwargs: Any) -> None:
        super().update_from_config(job_config, **kwargs)
        vocabulary, model = build_speech_tokenizer(job_config).vocabulary, job_config.model
        self.vocab_size = vocabulary.size
        self.num_quantizers, self.codebook_size = vocabulary.num_quantizers, vocabulary.codebook_size
        self.architecture, self.depth_train_fraction = model.architecture, model.depth_train_fraction
        self.predicts_text = any(task in TEXT_TARGETS for task in job_config.data.tasks)
        if self.architecture == "hierarchical" and not self.predicts_text:
            self.enable_weight_tying = False  # level 0 has its own output matrix
        if job_config.data.packing == "pack":
            self.attn_type, self.attn_mask_type = "varlen", "block_causal"

    @property
    def vocabulary(self) -> AudioVocabulary:
        base = self.vocab_size - self.codebook_size * self.num_quantizers - 2
        return AudioVocabulary(base, self.codebook_size, self.num_quantizers)

    @property
    def targets_per_frame(self) -> float:
        """Mean number of targets per frame."""
        fraction = self.depth_train_fraction if self.architecture == "hierarchical" else 1.0
        return 1 + fraction * (self.num_quantizers - 1)

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        """Return the number of parameters and the training FLOPs per target."""
        assert isinstance(model, LlamaMimi)
        return sum(p.numel() for p in model.parameters()), model.flops_per_target(seq_len)


def forward_flops(num_weights: int, args: TransformerModelArgs, num_keys: int) -> int:
    """Return the forward FLOPs per position: 2 for each weight of a matrix product, plus attention to all keys.

    The backward pass needs twice as many FLOPs (Kaplan et al. 2020, arXiv 2001.08361, section 2.1).
    """
    return 2 * num_weights + 4 * args.n_layers * args.dim * num_keys


def num_weights(*modules: nn.Module | None) -> int:
    return sum(p.numel() for module in modules if module is not None for p in module.parameters())


class PackedAttention(VarlenAttentionWrapper):
    """Causal attention within each clip of a packed sequence: TorchTitan's kernel on GPUs, else a loop over clips.

    On CPUs, attention with a mask takes 1 to 2.8 times as long as the loop (scripts/benchmarks/LEDGER.md).
    """

    def forward(
        self, q_BHLD: torch.Tensor, k_BGLD: torch.Tensor, v_BGLD: torch.Tensor, bounds: VarlenMetadata
    ) -> torch.Tensor:
        """Return outputs of shape (B, L, H, D) (loop) or (B * L, H, D) (kernel). G: number of key heads."""
        if q_BHLD.is_cuda and q_BHLD.dtype in (torch.bfloat16, torch.float16):
            return super().forward(q_BHLD, k_BGLD, v_BGLD, bounds)
        B, H, L, D = q_BHLD.shape
        lengths = bounds.cu_seq_q.diff().tolist()
        # Concatenate all sequences, with heads first. Splits have a cheaper backward pass than slices.
        clips = zip(*(x.transpose(0, 1).flatten(1, 2).split(lengths, 1) for x in (q_BHLD, k_BGLD, v_BGLD)), strict=True)
        outputs = [
            F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=len(q) != len(k))
            for q, k, v in clips
        ]
        return torch.cat(outputs, 2).view(H, B, L, D).permute(1, 2, 0, 3).contiguous()


class LlamaMimi(Transformer):
    """Llama 3 decoder that returns `LazyLogits`. In a packed sequence, each clip begins where ``positions`` is 0."""

    def __init__(self, model_args: LlamaMimiArgs) -> None:
        super().__init__(model_args)
        self.is_tied = model_args.enable_weight_tying
        self.output = None if self.is_tied else PendingOutput(model_args.dim, model_args.vocab_size, bias=False)
        if model_args.attn_type == "varlen":
            for layer in self.layers.values():
                layer.attention.inner_attention = PackedAttention()

    @property
    def output_layer(self) -> nn.Module:
        """The layer whose weight is the output matrix."""
        return self.tok_embeddings if self.is_tied else self.output

    def flops_per_target(self, seq_len: int) -> int:
        """Return the training FLOPs per target. Embedding lookups are not counted.

        A frozen weight needs 2 FLOPs less, because its gradient is not computed. The trained update of the output
        matrix needs only a gradient.
        """
        parts = (self.layers, self.norm, self.output_layer)
        frozen = sum(p.numel() for part in parts for p in part.parameters() if not p.requires_grad)
        rows = getattr(self.output_layer, "audio_rows", torch.empty(0)).numel()
        return 3 * forward_flops(num_weights(*parts) - rows, self.model_args, seq_len) - 2 * (frozen - rows)

    def decoding_flops(self, num_frames: int) -> int:
        """Return the FLOPs of decoding a frame with a key-value cache, after ``num_frames`` frames of context.

        At each level, only the logits of codes of this level (and, at level 0, of ``</audio>``) are computed.
        """
        args, Q = self.model_args, self.model_args.num_quantizers
        layers, positions = num_weights(self.layers, self.norm), range(num_frames * Q + 1, (num_frames + 1) * Q + 1)
        logits = 2 * args.dim * (Q * args.codebook_size + 1)
        return logits + sum(forward_flops(layers, args, num_keys) for num_keys in positions)

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        super().init_weights(buffer_device)
        if self.is_tied:  # as in Hugging Face; with unit variance, each token predicts itself
            nn.init.normal_(self.tok_embeddings.weight, std=0.02)
        init_lora(self)

    def get_attention_masks(
        self, input_batch: torch.Tensor, tokenizer: Any, extra_inputs: dict[str, torch.Tensor] | None = None
    ) -> VarlenMetadata:
        """Return the bounds of the clips in a batch, computed from ``positions`` (B, L) in ``extra_inputs``."""
        if self.model_args.attn_type != "varlen":
            raise TypeError("a sequence of one clip does not need a mask")  # TorchTitan's validator expects this type
        assert extra_inputs is not None
        positions_BL = extra_inputs["positions"]
        starts_N = (positions_BL.flatten() == 0).nonzero().flatten().to(torch.int32)
        bounds = F.pad(starts_N, (0, 1), value=positions_BL.numel())
        torch._dynamo.mark_dynamic(bounds, 0)  # one compilation for all numbers of clips
        # An upper bound for all lengths. To compute the exact maximum, the host would have to wait for the GPU.
        longest = positions_BL.shape[1]
        return VarlenMetadata(cu_seq_q=bounds, cu_seq_k=bounds, max_q=longest, max_k=longest)

    def forward(self, tokens: torch.Tensor, attention_masks: Any = None, positions: Any = None) -> LazyLogits:
        """Return the lazy logits (B, L, V) of token ids (B, L)."""
        output = super().forward(tokens, attention_masks, positions)
        if not self.is_tied:
            return output
        if isinstance(output, DTensor):  # with tensor parallelism, positions are sharded
            output = output.redistribute(placements=[Replicate()])
        return pending_logits(output, output_matrix(self.tok_embeddings))


def depth_args(**shape: Any) -> LlamaMimiArgs:
    """Return the arguments of a depth decoder. RoPE is not scaled, because a frame has only Q positions."""
    return LlamaMimiArgs(**shape, rope_scaling_args=RoPEScalingArgs(scaling_factor=1.0))


LLAMA_3_2_ROPE = RoPEScalingArgs(32.0, 1.0, 4.0, 8192)
LLAMA_3_1_ROPE = RoPEScalingArgs(8.0, 1.0, 4.0, 8192)
SHAPE = re.compile(r"(\d+)x(\d+)(?:\+(\d+)x(\d+))?")  # width x layers of the backbone + of the depth decoder


def sized(width: int, num_layers: int, depth_width: int, num_depth_layers: int) -> LlamaMimiArgs:
    """Return a shape with the ratios of Llama-3.2-1B (backbone) and of CSM-1B (depth decoder).

    In the backbone, a head has 64 dimensions, 4 heads share a key head, and the feed-forward layers are 4 times as
    wide. The depth decoder has 8 heads and 2 key heads, and its feed-forward layers are 8 times as wide.
    """
    return LlamaMimiArgs(
        dim=width,
        n_layers=num_layers,
        n_heads=width // 64,
        n_kv_heads=width // 256,
        ffn_dim=4 * width,
        rope_scaling_args=LLAMA_3_2_ROPE,
        enable_weight_tying=True,
        depth=depth_args(dim=depth_width, n_layers=num_depth_layers, n_heads=8, n_kv_heads=2, ffn_dim=8 * depth_width),
    )


class Flavors(dict[str, LlamaMimiArgs]):
    """Shapes by name, and `sized` shapes: "768x12+384x3" has a depth decoder of width 384 with 3 layers.

    By default, the depth decoder has half the width and a quarter of the layers of the backbone, as in CSM-1B. The
    flattened and the hierarchical model of a shape have the same backbone. The flattened model has no depth decoder.
    """

    def __contains__(self, name: object) -> bool:
        try:
            return self[str(name)] is not None
        except KeyError:
            return False

    def __missing__(self, name: str) -> LlamaMimiArgs:
        if (match := SHAPE.fullmatch(name)) is None:
            raise KeyError(name)
        width, num_layers = int(match[1]), int(match[2])
        depth_width, num_depth_layers = int(match[3] or width // 2), int(match[4] or max(1, num_layers // 4))
        # 256: 4 heads of 64 share a key head in the backbone. 16: RoPE needs an even width of the 8 depth heads.
        if min(width, num_layers, depth_width, num_depth_layers) < 1 or width % 256 or depth_width % 16:
            raise KeyError(name)
        return sized(width, num_layers, depth_width, num_depth_layers)


FLAVORS = Flavors(
    {
        "tiny": LlamaMimiArgs(
            dim=192,
            n_layers=4,
            n_heads=6,
            n_kv_heads=2,
            ffn_dim=512,
            rope_scaling_args=LLAMA_3_2_ROPE,
            enable_weight_tying=True,
            depth=depth_args(dim=96, n_layers=1, n_heads=3, n_kv_heads=1, ffn_dim=768),
        ),
        "1B": sized(2048, 16, 1024, 4),  # Llama-3.2-1B, and CSM-1B's depth decoder
        "8B": LlamaMimiArgs(  # Llama-3.1-8B
            dim=4096,
            n_layers=32,
            n_heads=32,
            n_kv_heads=8,
            ffn_dim=14336,
            rope_scaling_args=LLAMA_3_1_ROPE,
            depth=depth_args(dim=2048, n_layers=8, n_heads=16, n_kv_heads=4, ffn_dim=16384),
        ),
    }
)
