"""Add the audio tokens of a codec to the tokenizer, embeddings and configuration of a Hugging Face Llama.

    uv run python scripts/prepare_base_model.py --base_model meta-llama/Llama-3.2-1B --num_quantizers 4 \\
        --output_dir models/Llama-3.2-1B-mimi-q4

The large configs load the prepared model from the folder `model.hf_assets_path`. With `--random_weights`, the base
model needs only a config.json and a tokenizer. The script then does not write weights, and training starts from random
weights. If the config sets `model.vocabulary = "audio"`, set `--vocabulary audio`, which removes the text tokens. The
embeddings of the other tokens do not change.
"""

from dataclasses import dataclass
from pathlib import Path

from llama_mimi.common.choices import DEFAULT_CODEC, Precision, VocabularyKind
from llama_mimi.common.command_line import command


@dataclass
class Options:
    base_model: str  # hub id or folder of a Hugging Face Llama
    output_dir: Path  # new folder for the model; set model.hf_assets_path to this folder
    codec: str = DEFAULT_CODEC  # hub id or folder of a Mimi codec
    num_quantizers: int = 4  # number of quantizer levels per frame
    vocabulary: VocabularyKind = "llama"  # 'llama' keeps the text tokens; 'audio' removes the text tokens
    dtype: Precision = "float32"  # precision of the saved weights
    seed: int = 0  # random seed for the embeddings of new tokens
    random_weights: bool = False  # write only tokenizer and configuration; training then starts from random weights


if __name__ == "__main__":
    with command(Options, __doc__) as options:
        from llama_mimi.checkpoint.conversion import prepare_base_model

        prepare_base_model(**vars(options))
