"""Extend a Hugging Face Llama once by the audio tokens of a codec: tokenizer, embeddings, configuration.

    uv run python scripts/prepare_base_model.py --base_model meta-llama/Llama-3.2-1B --num_quantizers 4 \\
        --output_dir models/Llama-3.2-1B-mimi-q4

The result is what `model.hf_assets_path` of the large configs names. `--random_weights` needs only the base model's
config.json and tokenizer and writes no weights: training then starts from random ones. `--vocabulary audio` leaves the
text out, for `model.vocabulary = "audio"`: special tokens and audio tokens keep the rows they have with it.
"""

from llama_mimi.checkpoint.conversion import prepare_base_model
from llama_mimi.common.command_line import run_command

if __name__ == "__main__":
    run_command(prepare_base_model, __doc__)
