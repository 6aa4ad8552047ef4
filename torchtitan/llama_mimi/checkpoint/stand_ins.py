"""Models of real shapes with random weights, for benchmarks and dry runs without downloads."""

import copy
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import MimiConfig, MimiModel, PreTrainedTokenizerFast

from llama_mimi.audio.mimi import DEFAULT_CODEC
from llama_mimi.checkpoint.huggingface import hf_config
from llama_mimi.model.llama import FLAVORS

LLAMA_3_VOCABULARY = 128_256


def write_tokenizer(folder: Path, num_entries: int = LLAMA_3_VOCABULARY) -> None:
    """Write a tokenizer of meaningless words, with BOS and padding at the places of Llama 3."""
    words = {f"w{i}": i for i in range(num_entries)}
    bos, pad = f"w{num_entries - 256}", f"w{num_entries - 252}"
    tokenizer = Tokenizer(models.WordLevel(words, "w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, pad_token=pad).save_pretrained(folder)


def write_stand_ins(folder: Path) -> None:
    """Write a Llama-3.2-1B without weights, a tokenizer of Llama 3's size, and a Mimi with random weights."""
    write_tokenizer(folder / "llama")
    args = copy.copy(FLAVORS["1B"])
    args.vocab_size = LLAMA_3_VOCABULARY
    hf_config(args).save_pretrained(folder / "llama")
    torch.manual_seed(0)
    MimiModel(MimiConfig()).save_pretrained(folder / "mimi")


def write_missing(job_config: Any, folder: Path) -> None:
    """Replace a missing model folder and the default codec in a config by stand-ins with the same shapes."""
    if not Path(job_config.model.hf_assets_path).is_dir():
        job_config.model.hf_assets_path = str(folder / "llama")
        write_tokenizer(folder / "llama")
    if job_config.codec.name == DEFAULT_CODEC:
        job_config.codec.name = str(folder / "mimi")
        MimiConfig(num_quantizers=32).save_pretrained(folder / "mimi")
