"""The two architectures as Hugging Face folders, behind one set of functions.

A flattened model is an ordinary Llama, a hierarchical one an ordinary CSM.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torchtitan.models.llama3.model.state_dict_adapter import Llama3StateDictAdapter
from transformers import AutoConfig, CsmForConditionalGeneration, LlamaForCausalLM, PreTrainedConfig

from llama_mimi.checkpoint.csm import HierarchicalStateDictAdapter, csm_args, csm_config, csm_state
from llama_mimi.checkpoint.huggingface import LlamaMimiStateDictAdapter, hf_config, llama_state, model_args
from llama_mimi.common.errors import UserError
from llama_mimi.common.hub import load_pretrained
from llama_mimi.model.llama import LlamaMimiArgs
from llama_mimi.tokens.units import Architecture


@dataclass(frozen=True)
class FolderKind:
    """What a folder of one architecture holds.

    Args:
        model_type: what its configuration calls itself.
        stock_class: of its weights.
        entries_key: of the configuration, which says how many entries the vocabulary has.
        adapter: TorchTitan's seam for initial weights.
        config: from our arguments and further entries to its configuration.
        args: the inverse.
        state: from our weights to its own.
    """

    model_type: str
    stock_class: type
    entries_key: str
    adapter: type[Llama3StateDictAdapter]
    config: Callable[..., PreTrainedConfig]
    args: Callable[[Any], LlamaMimiArgs]
    state: Callable[[dict[str, torch.Tensor], Any], dict[str, torch.Tensor]]


KINDS: dict[Architecture, FolderKind] = {
    "flattened": FolderKind(
        model_type="llama",
        stock_class=LlamaForCausalLM,
        entries_key="vocab_size",
        adapter=LlamaMimiStateDictAdapter,
        config=hf_config,
        args=model_args,
        state=llama_state,
    ),
    "hierarchical": FolderKind(
        model_type="csm",
        stock_class=CsmForConditionalGeneration,
        entries_key="text_vocab_size",
        adapter=HierarchicalStateDictAdapter,
        config=csm_config,
        args=csm_args,
        state=csm_state,
    ),
}


def state_dict_adapter(args: LlamaMimiArgs, hf_assets_path: str | None) -> Llama3StateDictAdapter:
    return KINDS[args.architecture].adapter(args, hf_assets_path)


def load_config(folder: str, what: str) -> tuple[PreTrainedConfig, FolderKind]:
    """The configuration of a model, and of which kind it is.

    Raises:
        UserError: the folder is missing or of another kind; see `llama_mimi.common.hub.load_pretrained`.
    """
    config = load_pretrained(AutoConfig, folder, what=what)
    kinds = {kind.model_type: kind for kind in KINDS.values()}
    if config.model_type not in kinds:
        raise UserError(f"'{folder}' is a '{config.model_type}', not one of: {', '.join(kinds)}; name another {what}")
    return config, kinds[config.model_type]
