"""Extend a Hugging Face Llama once by the units of a codec: tokenizer, embeddings, configuration.

    uv run python scripts/prepare_base_model.py --base_model meta-llama/Llama-3.2-1B --num_quantizers 4 \\
        --output_dir models/Llama-3.2-1B-mimi-q4

The result is what `model.hf_assets_path` of the large configs names. `--random_weights` needs only the base model's
config.json and tokenizer and writes no weights: training then starts from random ones. `--vocabulary audio` leaves the
text out, for `model.vocabulary = "audio"`: special tokens and units keep the rows they have with it.
"""

import argparse
from pathlib import Path
from typing import get_args

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llama_mimi.codec import DEFAULT_CODEC, DTYPES, load_codec_config
from llama_mimi.errors import UserError, run_cli
from llama_mimi.hf import save_folder
from llama_mimi.hub import load_pretrained
from llama_mimi.units import SPECIAL_ROLES, VocabularyKind, audio_tokenizer, extend_tokenizer, has_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model", required=True, help="Hugging Face Llama: hub id or folder")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--codec", default=DEFAULT_CODEC, help="Mimi codec: hub id or folder")
    parser.add_argument("--num_quantizers", type=int, default=4, help="quantizer levels a frame")
    parser.add_argument("--vocabulary", choices=get_args(VocabularyKind), default="llama", help="audio: no text")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="precision of the saved weights")
    parser.add_argument("--seed", type=int, default=0, help="of the new embedding rows")
    parser.add_argument("--random_weights", action="store_true", help="write tokenizer and config only")
    flags = parser.parse_args()

    codec = load_codec_config(flags.codec, flags.num_quantizers)
    config = load_pretrained(LlamaConfig, flags.base_model, what="base model")
    tokenizer = load_pretrained(AutoTokenizer, flags.base_model, what="tokenizer")
    if config.vocab_size != len(tokenizer):
        raise UserError(
            f"'{flags.base_model}' has {config.vocab_size} embedding rows but {len(tokenizer)} tokens; units must "
            "follow the text vocabulary directly, so use the unmodified base model"
        )
    if flags.vocabulary == "llama" and not has_text(tokenizer):
        raise UserError(
            f"--vocabulary is llama, but the tokenizer of '{flags.base_model}' holds no text; use the unmodified base "
            "model, or --vocabulary audio"
        )
    whole, vocabulary = extend_tokenizer(tokenizer, codec.codebook_size, flags.num_quantizers)
    num_drawn, kept, special_ids = vocabulary.size, whole, {}
    if flags.vocabulary == "audio":
        kept, vocabulary = extend_tokenizer(audio_tokenizer(whole), codec.codebook_size, flags.num_quantizers)
        special_ids = {f"{role}_id": getattr(kept, f"{role}_id") for role in SPECIAL_ROLES}

    extra = {"num_quantizers": flags.num_quantizers, "codec": flags.codec, **special_ids}
    if flags.random_weights:
        config.update({"vocab_size": vocabulary.size, **extra})
        save_folder(flags.output_dir, config, kept)
    else:
        model = load_pretrained(LlamaForCausalLM, flags.base_model, what="base model", dtype=DTYPES[flags.dtype])
        torch.manual_seed(flags.seed)
        # new rows are drawn around the mean of the old ones, with their covariance
        model.resize_token_embeddings(num_drawn, mean_resizing=True)
        if kept is not whole:
            keep_rows(model, whole.convert_tokens_to_ids(kept.convert_ids_to_tokens(range(vocabulary.size))))
        model.config.update(extra)
        model.generation_config.update(**special_ids)
        save_folder(flags.output_dir, model, kept)
    print(
        f"{flags.base_model} + {vocabulary.size - vocabulary.base:,} units -> {flags.output_dir} "
        f"({vocabulary.size:,} vocabulary entries)"
    )


@torch.no_grad()
def keep_rows(model: LlamaForCausalLM, ids: list[int]) -> None:
    """Make ``ids``, in this order, the whole vocabulary of a model."""
    matrices = model.get_input_embeddings(), model.get_output_embeddings()
    rows = [matrix.weight[ids] for matrix in matrices]  # of both first, as they may be one
    for matrix, kept in zip(matrices, rows, strict=True):
        matrix.weight[: len(ids)] = kept
    model.resize_token_embeddings(len(ids))


if __name__ == "__main__":
    run_cli(main)
