"""Continue prompts and measure the continuations: speaker similarity, quality and transcripts.

    uv run python eval/generation.py --model_name models/tiny --corpus "assets/tiny/corpus/validation-*.parquet" \\
        --prompt_seconds 1.6 --recording_seconds 2.6 --seconds 2 --speaker_model assets/tiny/speaker_encoder \\
        --asr_model assets/tiny/recogniser

Under torchrun, the ranks share the work. To continue a killed run, run the command again.
"""

from llama_mimi.common.command_line import command
from llama_mimi.judging.options import GenerationOptions

if __name__ == "__main__":
    with command(GenerationOptions, __doc__) as options:
        from llama_mimi.judging.script import judge_generations

        judge_generations(options)
