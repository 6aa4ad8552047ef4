"""Continue speech, speak a text, or transcribe speech: one input, or all inputs of a folder or a file.

uv run python inference.py --model_name models/tiny --prompt assets/tiny/prompt.wav --output_file continuation.wav
"""

from llama_mimi.common.command_line import command
from llama_mimi.generation.options import InferenceOptions

if __name__ == "__main__":
    with command(InferenceOptions, __doc__) as options:
        from llama_mimi.generation.script import run_inference

        run_inference(options)
