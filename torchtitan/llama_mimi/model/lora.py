"""LoRA (Hu et al. 2021, arXiv 2106.09685): train updates of low rank, and keep the weights of the model frozen.

This file registers the model converter "lora" of TorchTitan. The optimizer contains only weights that are not frozen.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.protocols.model_converter import register_model_converter
from torchtitan.tools.logging import logger

from llama_mimi.common.choices import LORA_TARGETS

LORA_WEIGHTS = (".lora_A", ".lora_B", ".audio_rows")  # ends of the names of all weights that LoRA adds


class LoRALinear(nn.Linear):
    """Linear layer with a frozen weight W and a trained update: ``W x + scale * B A dropout(x)``."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float, dropout: float) -> None:
        in_out = linear.in_features, linear.out_features
        super().__init__(*in_out, bias=False, device="meta", dtype=linear.weight.dtype)
        self.requires_grad_(False)
        self.scale, self.dropout = scale, dropout
        self.lora_A = nn.Parameter(torch.empty(rank, in_out[0], device="meta"))
        self.lora_B = nn.Parameter(torch.empty(in_out[1], rank, device="meta"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        down = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A)
        return super().forward(x) + self.scale * F.linear(down, self.lora_B)


class _AudioEmbedding(nn.Embedding):
    """Frozen embeddings; ``audio_rows`` is the trained update of the last rows, which are the audio tokens."""

    audio_rows: nn.Parameter

    def forward(self, ids_BL: torch.Tensor) -> torch.Tensor:
        rows_BL = ids_BL - (len(self.weight) - len(self.audio_rows))
        update_BLD = F.embedding(rows_BL.clamp(min=0), self.audio_rows)
        return super().forward(ids_BL) + update_BLD * (rows_BL >= 0)[..., None]


class LoRAConverter:
    """Model converter that freezes a flattened model and adds LoRA to the layers in ``lora.targets``."""

    def __init__(self, job_config: Any, parallel_dims: Any) -> None:
        self._settings = job_config.lora
        # The forward pass casts weights to this type. Frozen weights have this type from the start, to save memory.
        self._frozen_dtype = TORCH_DTYPE_MAP[job_config.training.mixed_precision_param]

    def convert(self, model: Any) -> None:
        settings, V, D = self._settings, model.model_args.vocab_size, model.model_args.dim
        names, scale = [LORA_TARGETS[target] for target in settings.targets], settings.alpha / settings.rank
        model.requires_grad_(False)
        for parent in [*model.layers.modules()]:
            for name, layer in [*parent.named_children()]:
                if isinstance(layer, nn.Linear):
                    layer.to(self._frozen_dtype)
                    if name in names:
                        setattr(parent, name, LoRALinear(layer, settings.rank, scale, settings.dropout))
        if not model.is_tied:
            model.output.to(self._frozen_dtype)
        if settings.train_audio_tokens:
            with torch.device("meta"):
                model.tok_embeddings = _AudioEmbedding(V, D).requires_grad_(False)
                for layer in {model.tok_embeddings, model.output_layer}:  # one layer if tied
                    layer.audio_rows = nn.Parameter(torch.empty(V - model.model_args.vocabulary.base, D))
        num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        num_frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
        logger.info(f"LoRA trains {num_trained:,} weights and freezes {num_frozen:,} weights")

    def post_optimizer_hook(self, model: Any) -> None:
        """Do nothing; TorchTitan calls this method after each step."""


def init_lora(model: nn.Module) -> None:
    """Initialize the weights that LoRA adds, as in PEFT. The values do not depend on the number of ranks."""
    generator = torch.Generator().manual_seed(torch.initial_seed())
    for name, weight in model.named_parameters():
        if name.endswith((".lora_B", ".audio_rows")):
            nn.init.zeros_(weight)
        elif name.endswith(".lora_A"):
            whole = nn.init.kaiming_uniform_(torch.empty(weight.shape), math.sqrt(5), generator=generator)
            if isinstance(weight, DTensor):
                whole = distribute_tensor(whole, weight.device_mesh, weight.placements, src_data_rank=None)
            weight.copy_(whole)


register_model_converter(LoRAConverter, "lora")
