"""The two architectures as Hugging Face folders: a flattened model is a Llama, a hierarchical one a CSM."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torchtitan.models.llama3.model.state_dict_adapter import Llama3StateDictAdapter
from transformers import AutoConfig, CsmForConditionalGeneration, LlamaForCausalLM, PreTrainedConfig

from llama_mimi.checkpoint.csm import HierarchicalStateDictAdapter, codec_state, csm_args, csm_config, csm_state
from llama_mimi.checkpoint.huggingface import LlamaMimiStateDictAdapter, hf_config, llama_state, model_args
from llama_mimi.common.errors import UserError, first_line
from llama_mimi.common.hub import load_pretrained, require_no_difference
from llama_mimi.model.architectures import build_model
from llama_mimi.model.llama import LlamaMimiArgs
from llama_mimi.tokens.units import Architecture


@dataclass(frozen=True)
class FolderKind:
    """The Hugging Face folder of one architecture.

    Args:
        model_type: of its configuration.
        stock_class: class of the model.
        entries_key: key of the vocabulary size in the configuration.
        adapter: TorchTitan's adapter for initial weights.
        config: returns the configuration of our arguments, with further entries; ``args`` is the inverse.
        state: returns our weights under its names.
        extra_state: returns the other weights in it, for its configuration and the path or hub id of the codec.
        sampled: parts of the stock model that have a generation config of their own.
        description, usage: for the model card.
    """

    model_type: str
    stock_class: type
    entries_key: str
    adapter: type[Llama3StateDictAdapter]
    config: Callable[..., PreTrainedConfig]
    args: Callable[[Any], LlamaMimiArgs]
    state: Callable[[dict[str, torch.Tensor], Any], dict[str, torch.Tensor]]
    extra_state: Callable[[Any, str], dict[str, torch.Tensor]]
    sampled: tuple[str, ...]
    description: str
    usage: str


KINDS: dict[Architecture, FolderKind] = {
    "flattened": FolderKind(
        model_type="llama",
        stock_class=LlamaForCausalLM,
        entries_key="vocab_size",
        adapter=LlamaMimiStateDictAdapter,
        config=hf_config,
        args=model_args,
        state=llama_state,
        extra_state=lambda config, codec: {},
        sampled=(),
        description="a plain Llama decoder over flattened Mimi codec tokens (arXiv 2509.14882)",
        usage="""\
A clip is `<|begin_of_text|><audio><c_0>...<c_{last_level}>...</audio>`, frame by frame. Load it with
`AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`; continue speech with `inference.py` of
Llama-Mimi.""",
    ),
    "hierarchical": FolderKind(
        model_type="csm",
        stock_class=CsmForConditionalGeneration,
        entries_key="text_vocab_size",
        adapter=HierarchicalStateDictAdapter,
        config=csm_config,
        args=csm_args,
        state=csm_state,
        extra_state=codec_state,
        sampled=("depth_decoder",),
        description="a Llama over frames of Mimi codec tokens, and a small decoder over the levels of a frame, as CSM",
        usage="""\
A position is a frame of {num_quantizers} codes, behind `<|begin_of_text|><audio>`; the end is a frame of
{codebook_size}s. Without a prompt (12.5 positions are a second):

    model = CsmForConditionalGeneration.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)("<audio>", return_tensors="pt").input_ids
    audio = model.generate(ids, output_audio=True, max_new_tokens=125)

To continue speech, write `<0_0>` behind `<audio>` for each frame of the prompt. Give its samples as `input_values`
(1, 1, S) and their number as `input_values_cutoffs` (1, 1).

The class may draw an end in a few levels alone, which its codec cannot decode; `inference.py` of Llama-Mimi cannot.""",
    ),
}


def state_dict_adapter(args: LlamaMimiArgs, hf_assets_path: str | None) -> Llama3StateDictAdapter:
    return KINDS[args.architecture].adapter(args, hf_assets_path)


def check_initial_weights(folder: str, args: LlamaMimiArgs) -> None:
    """Compare the names and shapes of the safetensors in a folder with those that training loads.

    TorchTitan ends in a traceback if a tensor is missing, and ignores layers that the model does not have.

    Raises:
        UserError: they differ, or a file is damaged.
    """
    with torch.device("meta"):
        wanted = state_dict_adapter(args, None).to_hf(build_model(args).state_dict())
    try:
        found = HuggingFaceStorageReader(folder).read_metadata().state_dict_metadata
    except Exception as error:  # damaged files raise whatever their parser does
        raise UserError(f"the weights in '{folder}' are damaged ({first_line(error)}); prepare them again") from error
    # An output matrix of its own is not read where embeddings are tied, or where the output is that of frames.
    unexpected = {key for key in found.keys() - wanted.keys() - {"lm_head.weight"} if "rotary_emb" not in key}
    reshaped = {key for key in found.keys() & wanted.keys() if found[key].size != wanted[key].shape}
    problem = f"'{folder}' does not have the initial weights of this run"
    require_no_difference(wanted.keys() - found.keys(), unexpected, reshaped, problem, "model")


def load_config(folder: str, what: str) -> tuple[PreTrainedConfig, FolderKind]:
    """Return the configuration of a model, and the kind of its folder.

    Raises:
        UserError: the folder is missing or of another kind.
    """
    config = load_pretrained(AutoConfig, folder, what=what)
    kinds = {kind.model_type: kind for kind in KINDS.values()}
    if config.model_type not in kinds:
        raise UserError(f"'{folder}' is a '{config.model_type}', not one of: {', '.join(kinds)}; name another {what}")
    return config, kinds[config.model_type]
