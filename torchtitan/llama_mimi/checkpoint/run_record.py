"""What a run writes down about its model, so that a checkpoint can be converted without its config.

``<dump_folder>/hf_assets`` holds the extended tokenizer and the configuration of the model with ``num_quantizers``,
``codec`` and ``codec_attention``: all of a Hugging Face model folder but the weights.
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
    """The Hugging Face configuration of a speech language model.

    Args:
        training: what generation asks of it, such as ``task`` and ``max_audio_seconds``, the longest clip.
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
    """Write ``hf_assets``; one rank writes, the others go on.

    Raises:
        UserError: it cannot be written.
    """
    if not dist.is_initialized() or dist.get_rank() == 0:
        folder = Path(dump_folder) / ASSETS_FOLDER
        try:
            save_folder(folder, config, sequences.tokenizer)
        except Exception as error:
            if not isinstance(error, OSError) and "os error" not in str(error):  # `tokenizers` raises no OSError
                raise
            raise UserError(f"'{folder}' could not be written ({first_line(error)}); make room there") from error


def find_run_record(checkpoint: Path) -> Path:
    """``hf_assets`` of the run that ``checkpoint`` (a checkpoint folder or one step of it) belongs to.

    Raises:
        UserError: none beside the checkpoint.
    """
    for folder in (checkpoint, *checkpoint.resolve().parents[:2]):
        if (folder / ASSETS_FOLDER / "config.json").is_file():
            return folder / ASSETS_FOLDER
    raise UserError(
        f"no {ASSETS_FOLDER}/config.json beside '{checkpoint}', so the model's shape is not known; "
        "keep the run's folder together (hf_assets and checkpoint) and name the checkpoint inside it"
    )
