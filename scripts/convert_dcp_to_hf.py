"""Convert a training checkpoint to a Hugging Face model that `transformers` loads.

uv run python scripts/convert_dcp_to_hf.py --checkpoint outputs/tiny/checkpoint --output_dir models/tiny
"""

from llama_mimi.checkpoint.conversion import convert_checkpoint
from llama_mimi.common.command_line import run_command

if __name__ == "__main__":
    run_command(convert_checkpoint, __doc__)
