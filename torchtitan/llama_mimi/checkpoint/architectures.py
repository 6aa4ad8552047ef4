"""Hugging Face folders: a flattened model is saved as a Llama, a hierarchical model as a CSM."""

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from transformers import AutoConfig, CsmForConditionalGeneration, LlamaForCausalLM, PreTrainedConfig

from llama_mimi.audio.mimi import has_sliding_window, is_released, is_trained
from llama_mimi.checkpoint.csm import AUDIO_TABLES, CsmStateDictAdapter, csm_args, csm_config, csm_state
from llama_mimi.checkpoint.huggingface import LlamaMimiStateDictAdapter, hf_config, llama_state, model_args, save_folder
from llama_mimi.checkpoint.lora import ADAPTER_CONFIG
from llama_mimi.common.choices import DEFAULT_CODEC, Architecture
from llama_mimi.common.errors import UserError, first_line
from llama_mimi.common.files import read_json
from llama_mimi.common.hub import load_pretrained, require_no_difference
from llama_mimi.model.architectures import build_model
from llama_mimi.model.llama import LlamaMimiArgs
from llama_mimi.tokens.tokenizer import SpeechTokenizer

# Folder in dump_folder with the tokenizer and the configuration of the model, but no weights. Conversion reads it.
ASSETS_FOLDER = "hf_assets"


class FolderKind(NamedTuple):
    """Hugging Face format of one architecture."""

    stock_class: Any
    config: Callable[..., PreTrainedConfig]  # from our arguments and extra entries
    args: Callable[[Any], LlamaMimiArgs]  # inverse of `config`
    state: Callable[[dict[str, torch.Tensor], LlamaMimiArgs], dict[str, torch.Tensor]]  # weights of `stock_class`


KINDS: dict[Architecture, FolderKind] = {
    "flattened": FolderKind(LlamaForCausalLM, hf_config, model_args, llama_state),
    "hierarchical": FolderKind(CsmForConditionalGeneration, csm_config, csm_args, csm_state),
}


def state_dict_adapter(args: LlamaMimiArgs, folder: str) -> LlamaMimiStateDictAdapter:
    """Return TorchTitan's adapter for initial weights in a folder, which contains a Llama or a converted CSM."""
    is_csm = (read_json(folder, "config.json") or {}).get("model_type") == "csm"
    return (CsmStateDictAdapter if is_csm else LlamaMimiStateDictAdapter)(args, folder)


def check_initial_weights(folder: str, adapter: LlamaMimiStateDictAdapter) -> None:
    """Raise a `UserError` if safetensors are damaged, or if the names or shapes of tensors differ from the model's."""
    with torch.device("meta"):
        model = build_model(adapter.model_args)
    wanted = adapter.to_hf(model.state_dict())
    try:
        found = adapter.get_hf_storage_reader(folder).read_metadata().state_dict_metadata
    except Exception as error:  # the type of the error depends on the parser
        raise UserError(
            f"the weights in '{folder}' are damaged ({first_line(error)}); copy the folder again"
        ) from error
    # Training reads neither copies nor the output matrices of text that the model of this run does not have.
    unused = {"lm_head.weight", "text_head.weight", *AUDIO_TABLES}
    others = found.keys() - wanted.keys() - unused
    unexpected = {key for key in others if not re.search(r"rotary_emb|^codec_model\.", key)}
    reshaped = {key for key in found.keys() & wanted.keys() if found[key].size != wanted[key].shape}
    wrong = {"missing": wanted.keys() - found.keys(), "unexpected": unexpected, "of another shape": reshaped}
    require_no_difference(wrong, f"'{folder}' does not contain the initial weights of this run", "model")


def load_config(folder: str, what: str) -> tuple[PreTrainedConfig, FolderKind]:
    """Return the configuration and the format of a model; raise a `UserError` if the model type is not supported."""
    config = load_pretrained(AutoConfig, folder, what=what)
    kinds = {kind.stock_class.config_class.model_type: kind for kind in KINDS.values()}
    if config.model_type not in kinds:
        problem = f"'{folder}' is a model of type '{config.model_type}'"
        raise UserError(f"{problem}; choose a {what} of one of these types: {', '.join(kinds)}")
    return config, kinds[config.model_type]


def describe(config: PreTrainedConfig) -> str:
    """Describe a model for the log, from its configuration."""
    if not is_trained(config):
        return "a base model that was not trained on audio"
    (architecture,) = (name for name, kind in KINDS.items() if isinstance(config, kind.stock_class.config_class))
    attention = "sliding-window attention" if has_sliding_window(config) else "unlimited attention"
    codec = f"codec '{getattr(config, 'codec', DEFAULT_CODEC)}' with {attention}"
    release = " (first release)" if is_released(config) else ""
    parts = [f"a {architecture} Llama-Mimi{release}", f"Q = {config.num_quantizers}", codec]
    if hasattr(config, "tasks"):
        parts += [f"tasks {' '.join(config.tasks)}", f"clips of up to {config.max_audio_seconds:g} s"]
    return ", ".join(parts)


def speech_config(
    args: LlamaMimiArgs, tokenizer: SpeechTokenizer, codec_name: str, sliding_window: bool = True, **training: Any
) -> PreTrainedConfig:
    """Return the configuration of a speech model. ``training``: further entries, such as ``tasks``."""
    return KINDS[args.architecture].config(
        args,
        bos_token_id=tokenizer.text_tokenizer.bos_token_id,
        eos_token_id=tokenizer.vocabulary.audio_end_id,
        pad_token_id=tokenizer.text_tokenizer.pad_token_id,
        num_quantizers=tokenizer.vocabulary.num_quantizers,
        codec=codec_name,
        codec_sliding_window=sliding_window,
        **training,
    )


def save_run_record(
    dump_folder: str, config: PreTrainedConfig, tokenizer: SpeechTokenizer, lora: dict[str, Any] | None = None
) -> None:
    """Write the configuration, the tokenizer and the result of `adapter_config` to `ASSETS_FOLDER`, on rank 0."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        folder = Path(dump_folder) / ASSETS_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        # A killed run must leave only whole files in the folder.
        with tempfile.TemporaryDirectory(dir=dump_folder, prefix=".") as fresh:
            save_folder(Path(fresh), config, tokenizer.text_tokenizer)
            if lora:
                Path(fresh, ADAPTER_CONFIG).write_text(json.dumps(lora))
            else:
                (folder / ADAPTER_CONFIG).unlink(missing_ok=True)  # of an earlier run
            for file in Path(fresh).iterdir():
                file.replace(folder / file.name)


def find_run_record(checkpoint: Path) -> Path:
    """Return a run's `ASSETS_FOLDER`. ``checkpoint``: checkpoint folder of the run, or one step in this folder."""
    for folder in (checkpoint, *checkpoint.resolve().parents[:2]):
        if (folder / ASSETS_FOLDER / "config.json").is_file():
            return folder / ASSETS_FOLDER
    problem = f"{ASSETS_FOLDER}/config.json is missing in the dump_folder of '{checkpoint}'"
    raise UserError(f"{problem}; copy the folder {ASSETS_FOLDER} from the original dump_folder")
