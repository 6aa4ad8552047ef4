"""Add the audio tokens of a codec to the tokenizer, embeddings and configuration of a Hugging Face Llama.

    uv run python scripts/prepare_base_model.py --base_model meta-llama/Llama-3.2-1B --num_quantizers 4 \\
        --output_dir models/Llama-3.2-1B-mimi-q4

The large configs use the result as `model.hf_assets_path`. `--random_weights` needs only the config.json and the
tokenizer of the base model. It writes no weights, and training starts from random weights. `--vocabulary audio` removes
the text, for `model.vocabulary = "audio"`. The embeddings of special tokens and audio tokens do not change.
"""

from llama_mimi.checkpoint.conversion import prepare_base_model
from llama_mimi.common.command_line import run_command

if __name__ == "__main__":
    run_command(prepare_base_model, __doc__)
