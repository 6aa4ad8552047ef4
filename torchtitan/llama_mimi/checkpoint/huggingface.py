"""Conversion between TorchTitan's Llama and a Hugging Face folder: configuration, files and names of weights."""

import json
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate
from torchtitan.models.llama3.model.args import RoPEScalingArgs
from torchtitan.models.llama3.model.state_dict_adapter import Llama3StateDictAdapter
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from llama_mimi.common.errors import UserError
from llama_mimi.common.files import is_hidden, share_weights
from llama_mimi.model.llama import LlamaMimiArgs
from llama_mimi.model.lora import LORA_WEIGHTS

# Entries of a configuration that define the shape of a network: a Llama, or one of the two networks of a CSM.
NETWORK_KEYS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "rms_norm_eps", "rope_parameters"),
)
# Entries of rope_parameters, in the order of the fields of TorchTitan's `RoPEScalingArgs`.
SCALING_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def hf_config(args: LlamaMimiArgs, **extra: Any) -> LlamaConfig:
    """Return the configuration of an equivalent Hugging Face Llama (equal logits). ``extra``: additional entries."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(args.rope_theta)}
    if args.rope_scaling_args.scaling_factor != 1:
        rope |= dict(zip(SCALING_KEYS, astuple(args.rope_scaling_args), strict=True), rope_type="llama3")
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=args.vocab_size,
        hidden_size=args.dim,
        intermediate_size=args.ffn_dim,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads or args.n_heads,
        head_dim=args.dim // args.n_heads,
        rms_norm_eps=args.norm_eps,
        rope_parameters=rope,
        max_position_embeddings=131072,  # value of Llama 3.1 and 3.2
        tie_word_embeddings=args.enable_weight_tying,
        **extra,
    )


def model_args(config: LlamaConfig) -> LlamaMimiArgs:
    """Convert a config to model arguments (inverse of `hf_config`); raise a `UserError` for an unknown RoPE type."""
    rope = config.rope_parameters
    if rope["rope_type"] not in ("default", "llama3"):
        raise UserError(f"rope_type is '{rope['rope_type']}'; choose a model whose rope_type is 'default' or 'llama3'")
    scaling = [rope[key] for key in SCALING_KEYS] if rope["rope_type"] == "llama3" else [1.0]
    return LlamaMimiArgs(
        dim=config.hidden_size,
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        vocab_size=config.vocab_size,
        ffn_dim=config.intermediate_size,
        norm_eps=config.rms_norm_eps,
        rope_theta=rope["rope_theta"],
        rope_scaling_args=RoPEScalingArgs(*scaling),
        enable_weight_tying=getattr(config, "tie_word_embeddings", False),  # not in a depth decoder of CSM
    )


def llama_state(state: dict[str, torch.Tensor], args: LlamaMimiArgs) -> dict[str, torch.Tensor]:
    """Convert a model's weights to the names of `LlamaForCausalLM`. A tied ``lm_head`` is the embedding matrix."""
    theirs = Llama3StateDictAdapter(args, None).to_hf(state)
    return {"lm_head.weight": theirs["model.embed_tokens.weight"]} | theirs


def save_folder(folder: Path, model: PreTrainedModel | PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a tokenizer and a model (or its configuration) for both transformers 4.x and transformers 5.x.

    transformers 4.x reads ``rope_theta``, ``rope_scaling`` and, before 4.56, ``torch_dtype``. The CSM of transformers
    4.x needs ``tie_word_embeddings`` to be false. transformers 4.x lacks ``TokenizersBackend``, and reads
    ``extra_special_tokens`` as a dict. Without ``model_input_names``, tokenizers of transformers 4.x return
    ``token_type_ids``, which Llama does not accept.
    """
    if isinstance(model, PreTrainedModel):
        print(f"writing {model.num_parameters():,} parameters to {folder}", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    parts = [part for part in config.values() if isinstance(part, dict) and "rope_parameters" in part]
    for network in (config, *parts):
        rope = network["rope_parameters"]
        network["rope_theta"] = rope["rope_theta"]
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        network["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
    if "dtype" in config:
        config["torch_dtype"] = config["dtype"]
    if config["model_type"] == "csm":
        config |= {"tie_word_embeddings": False, "architectures": ["CsmForConditionalGeneration"]}

    tokens = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    if tokens["tokenizer_class"] == "TokenizersBackend":
        tokens["tokenizer_class"] = "PreTrainedTokenizerFast"  # name in 4.x, alias in 5.x
    tokens["model_input_names"] = ["input_ids", "attention_mask"]
    if isinstance(tokens.get("extra_special_tokens"), list):
        tokens["additional_special_tokens"] = tokens.pop("extra_special_tokens")

    for name, content in (("config.json", config), ("tokenizer_config.json", tokens)):
        text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
        (folder / name).write_text(text + "\n", encoding="utf-8")
    share_weights(folder)


class LlamaMimiStateDictAdapter(Llama3StateDictAdapter):
    """TorchTitan's adapter for initial weights, extended to any number of ranks.

    TorchTitan and Hugging Face order the rows of an attention head differently. TorchTitan reorders the shard of each
    rank, but this reordering fails if a shard contains only a part of a head (more ranks than key heads, or FSDP x TP).
    """

    def get_hf_storage_reader(self, path: str, from_quantized: bool = False) -> Any:
        """Return PyTorch's reader of safetensors, changed to skip hidden files such as `._*` (added by macOS)."""
        reader = super().get_hf_storage_reader(path, from_quantized)
        list_all = reader.fs.ls
        reader.fs.ls = lambda folder: [file for file in list_all(folder) if not is_hidden(Path(file).name)]
        return reader

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        state_dict = {key: weight for key, weight in state_dict.items() if not key.endswith(LORA_WEIGHTS)}
        if self.model_args.architecture == "hierarchical":  # a Llama lacks the depth decoder
            parts = ("layers.", "norm.", "tok_embeddings.", *["output."] * self.model_args.predicts_text)
            state_dict = {key: weight for key, weight in state_dict.items() if key.startswith(parts)}
        return super().to_hf(state_dict)

    def _permute(self, weight: torch.Tensor, num_heads: int, *shape: int) -> torch.Tensor:
        return on_whole(super()._permute, weight, num_heads)  # without ``shape``: an update has fewer columns

    def _reverse_permute(self, weight: torch.Tensor, num_heads: int, *shape: int) -> torch.Tensor:
        return on_whole(super()._reverse_permute, weight, num_heads)


def on_whole(change: Callable[..., torch.Tensor], weight: torch.Tensor, *args: Any) -> torch.Tensor:
    """Gather a matrix from all ranks, apply ``change``, and return the shard of this rank."""
    if not isinstance(weight, DTensor):
        return change(weight, *args)
    mesh = weight.device_mesh
    whole = DTensor.from_local(change(weight.full_tensor(), *args), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.redistribute(placements=weight.placements)
