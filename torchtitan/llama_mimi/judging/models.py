"""Models that listen or read: loaded whole or not at all."""

from typing import Any

import torch
from transformers import PreTrainedModel

from llama_mimi.common.hub import load_pretrained, weights_sha256
from llama_mimi.common.versions import versions

# Tensors of training alone, which published models lack or have beyond their class: the mask and the objective, the
# quantizer of wav2vec 2.0's pretraining, and a constant of old attention code.
WITHOUT_EFFECT = r"(masked_spec_embed|objective\.weight|\.masked_bias)$|^(quantizer|project_q|project_hid)\."


def load_listener(cls: Any, name: str, device: torch.device, *, what: str) -> PreTrainedModel:
    """Load a model for evaluation, in float32.

    Args:
        cls: class of `transformers`.
        name: hub id or folder; of safetensors, or of ``.bin`` files from which PyTorch reads weights alone.
        what: it is, for messages.

    Raises:
        UserError: it cannot be loaded, or its weights are those of another kind of model.
    """
    model = load_pretrained(
        cls, name, what=what, dtype=torch.float32, allow_torch_weights=True, without_effect=WITHOUT_EFFECT
    )
    return model.to(device).eval()


def describe_listener(name: str) -> dict[str, Any]:
    """What the values of a model that was loaded depend on."""
    return {"model": name, "sha256": weights_sha256(name), "transformers": versions()["transformers"]}
