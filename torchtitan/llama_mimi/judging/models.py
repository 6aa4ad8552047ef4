"""Models that listen or read: loaded whole or not at all."""

from typing import Any

import torch
from transformers import PreTrainedModel

from llama_mimi.common.errors import UserError
from llama_mimi.common.hub import load_pretrained, weights_sha256
from llama_mimi.common.versions import versions

# Of training alone; published models lack them.
NOT_NEEDED = ("masked_spec_embed", "objective.weight")


def load_listener(cls: Any, name: str, device: torch.device, *, what: str) -> PreTrainedModel:
    """A model in float32, for use.

    Args:
        cls: class of `transformers`.
        name: hub id or folder; of safetensors, or of ``.bin`` files from which PyTorch reads weights alone.
        what: it is, for messages.

    Raises:
        UserError: it cannot be loaded, or its weights are those of another kind of model, so that some would be random.
    """
    model, info = load_pretrained(
        cls, name, what=what, dtype=torch.float32, allow_torch_weights=True, output_loading_info=True
    )
    if missing := sorted(key for key in info["missing_keys"] if not key.endswith(NOT_NEEDED)):
        raise UserError(
            f"'{name}' lacks weights of a {cls.__name__}, the first is '{missing[0]}', so it is no {what}; name another"
        )
    return model.to(device).eval()


def describe_listener(name: str) -> dict[str, Any]:
    """What the values of a model that was loaded depend on."""
    return {"model": name, "sha256": weights_sha256(name), "transformers": versions()["transformers"]}
