"""Add the audio tokens of a codec to the tokenizer, embeddings and configuration of a Hugging Face Llama.

    uv run python scripts/prepare_base_model.py --base_model meta-llama/Llama-3.2-1B --num_quantizers 4 \\
        --output_dir models/Llama-3.2-1B-mimi-q4

The large configs use the result as `model.hf_assets_path`. `--random_weights` needs only the config.json and the
tokenizer of the base model. It writes no weights, and training starts from random weights. `--vocabulary audio` removes
the text, for `model.vocabulary = "audio"`. The embeddings of special tokens and audio tokens do not change.
"""

from dataclasses import dataclass
from pathlib import Path

from llama_mimi.common.choices import DEFAULT_CODEC, Precision, VocabularyKind
from llama_mimi.common.command_line import command


@dataclass
class Options:
    base_model: str  # Hugging Face Llama, hub id or folder
    output_dir: Path  # new folder; set model.hf_assets_path to it
    codec: str = DEFAULT_CODEC  # Mimi codec, hub id or folder
    num_quantizers: int = 4  # number of quantizer levels per frame
    vocabulary: VocabularyKind = "llama"  # llama keeps the text tokens; audio removes them
    dtype: Precision = "float32"  # precision of the saved weights
    seed: int = 0  # random seed for the new embedding rows
    random_weights: bool = False  # write only tokenizer and configuration; training then starts from random weights


if __name__ == "__main__":
    with command(Options, __doc__) as options:
        from llama_mimi.checkpoint.conversion import prepare_base_model

        prepare_base_model(**vars(options))
