"""``<dump_folder>/hf_assets``: a Hugging Face model folder without weights, with which a checkpoint is converted.

It contains the extended tokenizer and the configuration with ``num_quantizers``, ``codec`` and ``codec_attention``.
"""

from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import PreTrainedConfig

from llama_mimi.audio.mimi import CodecAttention
from llama_mimi.checkpoint.architectures import KINDS
from llama_mimi.checkpoint.huggingface import save_folder
from llama_mimi.common.errors import UserError, first_line
from llama_mimi.model.llama import LlamaMimiArgs
from llama_mimi.tokens.sequences import SequenceBuilder

ASSETS_FOLDER = "hf_assets"


def speech_config(
    args: LlamaMimiArgs,
    sequences: SequenceBuilder,
    codec_name: str,
    attention: CodecAttention = "windowed",
    **training: Any,
) -> PreTrainedConfig:
    """Return the Hugging Face configuration of a speech language model.

    Args:
        training: entries that generation needs, such as ``task`` and ``max_audio_seconds``, the longest clip.
    """
    return KINDS[args.architecture].config(
        args,
        bos_token_id=sequences.tokenizer.bos_token_id,
        eos_token_id=sequences.vocabulary.audio_end_id,
        pad_token_id=sequences.tokenizer.pad_token_id,
        num_quantizers=sequences.vocabulary.num_quantizers,
        codec=codec_name,
        codec_attention=attention,
        **training,
    )


def save_run_record(dump_folder: str, config: PreTrainedConfig, sequences: SequenceBuilder) -> None:
    """Write ``hf_assets`` on rank 0.

    Raises:
        UserError: it cannot be written.
    """
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    folder = Path(dump_folder) / ASSETS_FOLDER
    try:
        save_folder(folder, config, sequences.tokenizer)
    except Exception as error:
        if not isinstance(error, OSError) and "os error" not in str(error):  # `tokenizers` raises no OSError
            raise
        raise UserError(f"'{folder}' could not be written ({first_line(error)}); free disk space") from error


def find_run_record(checkpoint: Path) -> Path:
    """Return ``hf_assets`` of the run of ``checkpoint``, a checkpoint folder or one step in it.

    Raises:
        UserError: there is none.
    """
    for folder in (checkpoint, *checkpoint.resolve().parents[:2]):
        if (folder / ASSETS_FOLDER / "config.json").is_file():
            return folder / ASSETS_FOLDER
    raise UserError(
        f"there is no {ASSETS_FOLDER}/config.json beside '{checkpoint}'; keep {ASSETS_FOLDER} and checkpoint folder of "
        "a run together"
    )
