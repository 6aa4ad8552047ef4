"""Model and codec folders with real shapes but without weights, so that benchmarks and dry runs can work offline."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models
from transformers import MimiConfig, PreTrainedTokenizerFast

from llama_mimi.common.choices import DEFAULT_CODEC

LLAMA_3_VOCABULARY = 128_256


def write_tokenizer(folder: Path, num_entries: int = LLAMA_3_VOCABULARY) -> None:
    """Write a tokenizer with artificial words. The BOS and padding tokens have the ids of Llama 3."""
    words = {f"w{i}": i for i in range(num_entries)}
    bos, pad = f"w{num_entries - 256}", f"w{num_entries - 252}"
    tokenizer = Tokenizer(models.WordLevel(words, "w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, pad_token=pad).save_pretrained(folder)


def write_missing(job_config: Any, folder: Path) -> None:
    """In a config, replace a missing model folder and the default codec by folders without weights."""
    if not Path(job_config.model.hf_assets_path).is_dir():
        job_config.model.hf_assets_path = str(folder / "llama")
        write_tokenizer(folder / "llama")
    if job_config.codec.name == DEFAULT_CODEC:
        job_config.codec.name = str(folder / "mimi")
        MimiConfig(num_quantizers=32).save_pretrained(folder / "mimi")
