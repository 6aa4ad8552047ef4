"""Speak the texts of a corpus, and measure the speech: word error rate of an ASR model, speaker similarity, quality.

    uv run python eval/tts.py --model_name models/tiny_text_speech --corpus "assets/tiny/corpus/validation-*.parquet" \\
        --voice_seconds 0 --temperature 0 --quality none --asr_model assets/tiny/recogniser

Under torchrun, the ranks share the work. To continue a killed run, run the command again.
"""

from llama_mimi.common.command_line import command
from llama_mimi.judging.options import TtsOptions

if __name__ == "__main__":
    with command(TtsOptions, __doc__) as options:
        from llama_mimi.judging.script import judge_generations

        judge_generations(options)
