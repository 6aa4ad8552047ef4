"""LoRA in the format of PEFT, and the sum of updates and frozen weights."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from llama_mimi.checkpoint.huggingface import LlamaMimiStateDictAdapter
from llama_mimi.common.files import write_atomically
from llama_mimi.model.llama import LlamaMimiArgs

ADAPTER_CONFIG = "adapter_config.json"  # in the run record and in the folder of an adapter, as PEFT names it


def adapter_config(job_config: Any, args: LlamaMimiArgs) -> dict[str, Any]:
    """Return PEFT's configuration of the LoRA that a run trains; empty without LoRA."""
    if job_config.model.converters != ["lora"]:
        return {}
    lora, vocabulary = job_config.lora, args.vocabulary
    layers = ["embed_tokens", *["lm_head"] * (not args.enable_weight_tying)] * lora.train_audio_tokens
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": job_config.checkpoint.initial_load_path or job_config.model.hf_assets_path,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": lora.targets,
        "trainable_token_indices": {layer: [*range(vocabulary.base, vocabulary.size)] for layer in layers} or None,
    }


def merge_lora(
    state: dict[str, torch.Tensor], args: LlamaMimiArgs, config: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the weights of a model without LoRA, and the tensors of PEFT's adapter.

    The updates in ``state`` are added to its frozen weights, in place. ``config``: result of `adapter_config`.
    """
    merged = dict(state)
    adapter: dict[str, torch.Tensor] = {}
    to_hf = LlamaMimiStateDictAdapter(args, None).to_hf
    for key, update in state.items():
        layer, _, kind = key.rpartition(".")
        if kind not in ("lora_B", "audio_rows"):
            continue
        frozen = merged[f"{layer}.weight"]
        # `to_hf` renames a weight, and reorders the rows of attention heads.
        ((name, rows),) = to_hf({f"{layer}.weight": merged.pop(key)}).items()
        prefix = "base_model.model." + name.removesuffix("weight")
        if kind == "lora_B":
            down = merged.pop(f"{layer}.lora_A")
            frozen += config["lora_alpha"] / config["r"] * update @ down
            adapter |= {f"{prefix}lora_A.weight": down, f"{prefix}lora_B.weight": rows}
        else:
            frozen[-len(update) :] += update
            # PEFT stores whole rows under this name.
            adapter[f"{prefix}token_adapter.trainable_tokens_delta"] = frozen[-len(update) :]
    return merged, adapter


def save_adapter(folder: Path, adapter: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    """Write a folder that `peft.PeftModel.from_pretrained` loads."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: weight.contiguous() for name, weight in adapter.items()}, folder / "adapter_model.safetensors")
    write_atomically(str(folder), ADAPTER_CONFIG, json.dumps(config, indent=1).encode())
