"""Convert a training checkpoint to a Hugging Face model that `transformers` loads.

uv run python scripts/convert_dcp_to_hf.py --checkpoint outputs/tiny/checkpoint --output_dir models/tiny
"""

from dataclasses import dataclass
from pathlib import Path

from llama_mimi.common.choices import Precision
from llama_mimi.common.command_line import command


@dataclass
class Options:
    checkpoint: Path  # checkpoint folder of a run (the newest step is converted), or folder of one step
    output_dir: Path  # new folder for the Hugging Face model
    dtype: Precision = "float32"  # precision of the saved weights
    verify: bool = True  # check the checksums of the checkpoint before the conversion


if __name__ == "__main__":
    with command(Options, __doc__) as options:
        from llama_mimi.checkpoint.conversion import convert_checkpoint

        convert_checkpoint(**vars(options))
