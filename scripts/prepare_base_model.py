"""Add the audio tokens of a codec to the tokenizer, embeddings and configuration of a Hugging Face Llama.

    uv run python scripts/prepare_base_model.py --base_model meta-llama/Llama-3.2-1B --num_quantizers 4 \\
        --output_dir models/Llama-3.2-1B-mimi-q4

The large configs read the result from `model.hf_assets_path`. With `--random_weights`, the base model needs only a
config.json and a tokenizer. No weights are then written, and training starts from random weights. `--vocabulary audio`
removes the text tokens, for `model.vocabulary = "audio"`. The other embeddings do not change.
"""

from dataclasses import dataclass
from pathlib import Path

from llama_mimi.common.choices import DEFAULT_CODEC, Precision, VocabularyKind
from llama_mimi.common.command_line import command


@dataclass
class Options:
    base_model: str  # Hugging Face Llama, hub id or folder
    output_dir: Path  # new folder for the model; set model.hf_assets_path to this folder
    codec: str = DEFAULT_CODEC  # Mimi codec, hub id or folder
    num_quantizers: int = 4  # number of quantizer levels per frame
    vocabulary: VocabularyKind = "llama"  # 'llama' keeps the text tokens; 'audio' removes the text tokens
    dtype: Precision = "float32"  # precision of the saved weights
    seed: int = 0  # random seed for the new embedding rows
    random_weights: bool = False  # write only tokenizer and configuration; training then starts from random weights


if __name__ == "__main__":
    with command(Options, __doc__) as options:
        from llama_mimi.checkpoint.conversion import prepare_base_model

        prepare_base_model(**vars(options))
