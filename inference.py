"""Continue one speech prompt, or all speech prompts in a folder.

uv run python inference.py --model_name models/tiny --prompt assets/tiny/prompt.wav --output_file continuation.wav
"""

from llama_mimi.common.command_line import command
from llama_mimi.generation.options import ContinuationOptions

if __name__ == "__main__":
    with command(ContinuationOptions, __doc__) as options:
        from llama_mimi.generation.script import continue_speech

        continue_speech(options)
