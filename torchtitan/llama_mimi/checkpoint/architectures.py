"""The two architectures as Hugging Face folders: a flattened model is a Llama, a hierarchical one a CSM."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from transformers import AutoConfig, CsmForConditionalGeneration, LlamaForCausalLM, PreTrainedConfig

from llama_mimi.checkpoint.csm import csm_args, csm_config, csm_state
from llama_mimi.checkpoint.huggingface import LlamaMimiStateDictAdapter, hf_config, llama_state, model_args, save_folder
from llama_mimi.common.errors import UserError, first_line
from llama_mimi.common.hub import load_pretrained, require_no_difference
from llama_mimi.model.architectures import build_model
from llama_mimi.model.llama import LlamaMimiArgs
from llama_mimi.tokens.tokenizer import SpeechTokenizer
from llama_mimi.tokens.vocabulary import Architecture

# Folder in dump_folder, without weights, with which a run's checkpoints are converted: the extended tokenizer, and the
# configuration with num_quantizers, codec and codec_sliding_window.
ASSETS_FOLDER = "hf_assets"


class FolderKind(NamedTuple):
    """The Hugging Face folder of one architecture."""

    stock_class: Any
    config: Callable[..., PreTrainedConfig]  # of our arguments, with further entries
    args: Callable[[Any], LlamaMimiArgs]  # inverse of `config`
    state: Callable[[dict[str, torch.Tensor], LlamaMimiArgs], dict[str, torch.Tensor]]  # for the stock class
    description: str  # for the model card, as `usage`
    usage: str


KINDS: dict[Architecture, FolderKind] = {
    "flattened": FolderKind(
        *(LlamaForCausalLM, hf_config, model_args, llama_state),
        "a plain Llama decoder over flattened Mimi codec tokens (arXiv 2509.14882)",
        """\
A clip is `<|begin_of_text|><audio><c_0>...<c_{last_level}>...</audio>`, frame by frame. Load it with
`AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`; continue speech with `inference.py` of
Llama-Mimi.""",
    ),
    "hierarchical": FolderKind(
        *(CsmForConditionalGeneration, csm_config, csm_args, csm_state),
        "a Llama over frames of Mimi codec tokens, and a small decoder over the levels of a frame, as CSM",
        """\
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


def check_initial_weights(folder: str, args: LlamaMimiArgs) -> None:
    """Raise a `UserError` if safetensors are damaged, or do not have the names and shapes that training loads.

    TorchTitan ends in a traceback if a tensor is missing, and ignores layers that the model does not have.
    """
    with torch.device("meta"):
        model = build_model(args)
    adapter = LlamaMimiStateDictAdapter(args, None)
    wanted = adapter.to_hf(model.state_dict())
    try:
        found = adapter.get_hf_storage_reader(folder).read_metadata().state_dict_metadata
    except Exception as error:  # damaged files raise whatever their parser does
        raise UserError(f"the weights in '{folder}' are damaged ({first_line(error)}); prepare them again") from error
    # An output matrix of its own is not read where embeddings are tied, or where the output is that of frames.
    unexpected = {key for key in found.keys() - wanted.keys() - {"lm_head.weight"} if "rotary_emb" not in key}
    reshaped = {key for key in found.keys() & wanted.keys() if found[key].size != wanted[key].shape}
    wrong = {"missing": wanted.keys() - found.keys(), "unexpected": unexpected, "of another shape": reshaped}
    require_no_difference(wrong, f"'{folder}' does not have the initial weights of this run", "model")


def load_config(folder: str, what: str) -> tuple[PreTrainedConfig, FolderKind]:
    """Return the configuration of a model, and the kind of its folder; a `UserError` if it is of another kind."""
    config = load_pretrained(AutoConfig, folder, what=what)
    kinds = {kind.stock_class.config_class.model_type: kind for kind in KINDS.values()}
    if config.model_type not in kinds:
        raise UserError(f"'{folder}' is a '{config.model_type}', not one of: {', '.join(kinds)}; name another {what}")
    return config, kinds[config.model_type]


def speech_config(
    args: LlamaMimiArgs, tokenizer: SpeechTokenizer, codec_name: str, sliding_window: bool = True, **training: Any
) -> PreTrainedConfig:
    """Return the configuration of a speech model; ``training`` are entries that generation needs, such as ``task``."""
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


def save_run_record(dump_folder: str, config: PreTrainedConfig, tokenizer: SpeechTokenizer) -> None:
    """Write `ASSETS_FOLDER` on rank 0."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        save_folder(Path(dump_folder) / ASSETS_FOLDER, config, tokenizer.text_tokenizer)


def find_run_record(checkpoint: Path) -> Path:
    """Return `ASSETS_FOLDER` of the run of ``checkpoint``, a checkpoint folder or one step in it."""
    for folder in (checkpoint, *checkpoint.resolve().parents[:2]):
        if (folder / ASSETS_FOLDER / "config.json").is_file():
            return folder / ASSETS_FOLDER
    raise UserError(f"there is no {ASSETS_FOLDER}/config.json beside '{checkpoint}'; keep the two together")
