"""Extend a Hugging Face Llama once by the units of a codec: tokenizer, embeddings, configuration.

    uv run python scripts/prepare_base_model.py --base_model meta-llama/Llama-3.2-1B --num_quantizers 4 \\
        --output_dir models/Llama-3.2-1B-mimi-q4

The result is what `model.hf_assets_path` of the large configs names. `--random_weights` needs only the base model's
config.json and tokenizer and writes no weights: training then starts from random ones.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llama_mimi.codec import DEFAULT_CODEC, DTYPES, load_codec_config
from llama_mimi.errors import UserError, run_cli
from llama_mimi.hub import load_pretrained
from llama_mimi.units import extend_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model", required=True, help="Hugging Face Llama: hub id or folder")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--codec", default=DEFAULT_CODEC, help="Mimi codec: hub id or folder")
    parser.add_argument("--num_quantizers", type=int, default=4, help="quantizer levels a frame")
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
    tokenizer, vocabulary = extend_tokenizer(tokenizer, codec.codebook_size, flags.num_quantizers)

    extra = {"num_quantizers": flags.num_quantizers, "codec": flags.codec}
    if flags.random_weights:
        config.update({"vocab_size": vocabulary.size, **extra})
        config.save_pretrained(flags.output_dir)
    else:
        model = load_pretrained(LlamaForCausalLM, flags.base_model, what="base model", dtype=DTYPES[flags.dtype])
        torch.manual_seed(flags.seed)
        # new rows are drawn around the mean of the old ones, with their covariance
        model.resize_token_embeddings(vocabulary.size, mean_resizing=True)
        model.config.update(extra)
        model.save_pretrained(flags.output_dir)
    tokenizer.save_pretrained(flags.output_dir)
    print(
        f"{flags.base_model} + {vocabulary.size - vocabulary.base:,} units -> {flags.output_dir} "
        f"({vocabulary.size:,} vocabulary entries)"
    )


if __name__ == "__main__":
    run_cli(main)
