"""Turn a training checkpoint into an ordinary Hugging Face model that stock `transformers` loads.

uv run python scripts/convert_dcp_to_hf.py --checkpoint outputs/tiny/checkpoint --output_dir models/tiny
"""

from llama_mimi.checkpoint.conversion import convert_checkpoint
from llama_mimi.common.command_line import run_command

if __name__ == "__main__":
    run_command(convert_checkpoint, __doc__)
