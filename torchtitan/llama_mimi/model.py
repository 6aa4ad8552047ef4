"""TorchTitan's Llama 3 with what Llama-3.2-1B needs besides: tied embeddings and a 1B shape."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate
from torchtitan.distributed import ParallelDims
from torchtitan.models.llama3 import Transformer, TransformerModelArgs, parallelize_llama
from torchtitan.models.llama3.model.args import RoPEScalingArgs

from llama_mimi.sequences import load_sequences


@dataclass
class LlamaMimiArgs(TransformerModelArgs):
    """Llama 3 hyperparameters; ``vocab_size`` is set from the tokenizer and codec, never written in a flavour."""

    enable_weight_tying: bool = False

    @property
    def ffn_dim(self) -> int:
        """Width of the feed-forward layer, as TorchTitan derives it."""
        width = int(2 * 4 * self.dim / 3)
        if self.ffn_dim_multiplier is not None:
            width = int(self.ffn_dim_multiplier * width)
        return -(-width // self.multiple_of) * self.multiple_of

    def update_from_config(self, job_config: Any, **kwargs: Any) -> None:
        super().update_from_config(job_config, **kwargs)
        codec = job_config.codec
        sequences = load_sequences(job_config.model.hf_assets_path, codec.name, codec.num_quantizers)
        self.vocab_size = sequences.vocabulary.size

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        """Parameters and training FLOPs per token (6 a multiplied weight, plus attention).

        TorchTitan leaves the embedding out of the products, which is right for a lookup; a tied embedding is also
        the output projection and is multiplied.
        """
        num_params = sum(p.numel() for p in model.parameters())
        num_multiplied = num_params - (0 if self.enable_weight_tying else self.vocab_size * self.dim)
        attention = 6 * self.n_layers * self.n_heads * 2 * (self.dim // self.n_heads) * seq_len
        return num_params, 6 * num_multiplied + attention


class LlamaMimi(Transformer):
    """A plain Llama 3 decoder.

    With tied embeddings there is one matrix and one parameter, ``tok_embeddings.weight``: ``output`` is None, which
    TorchTitan's Transformer allows, and the logits are a product with the embedding.
    """

    def __init__(self, model_args: LlamaMimiArgs) -> None:
        super().__init__(model_args)
        self.is_tied = model_args.enable_weight_tying
        if self.is_tied:
            self.output = None

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        super().init_weights(buffer_device)
        if self.is_tied:  # as Hugging Face draws embeddings: of unit variance, each token would predict itself
            nn.init.normal_(self.tok_embeddings.weight, std=0.02)

    def forward(self, tokens: torch.Tensor, attention_masks: Any = None, positions: Any = None) -> torch.Tensor:
        """Token ids (B, L) to logits (B, L, V)."""
        hidden_BLD = super().forward(tokens, attention_masks, positions)
        if not self.is_tied:
            return hidden_BLD
        if isinstance(hidden_BLD, DTensor):  # tensor parallel: rows of the vocabulary stay on their ranks
            hidden_BLD = hidden_BLD.redistribute(placements=[Replicate()])
        return F.linear(hidden_BLD, self.tok_embeddings.weight)


def parallelize(model: LlamaMimi, parallel_dims: ParallelDims, job_config: Any) -> nn.Module:
    """TorchTitan's Llama 3 plan, with what tied embeddings and gloo need."""
    model = parallelize_llama(model, parallel_dims, job_config)
    if model.is_tied and isinstance(model.tok_embeddings, FSDPModule):
        # The matrix is needed again for the logits, so it stays gathered between the two uses.
        model.tok_embeddings.set_reshard_after_forward(False)
    if not torch.cuda.is_available():
        for module in model.modules():
            if isinstance(module, FSDPModule):  # gloo lacks the pre-multiplied sum that FSDP2 divides gradients by
                module.set_force_sum_reduction_for_comms(True)
    return model


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
    ),
}
