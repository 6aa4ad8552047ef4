"""Transcribe recordings, and compare the transcripts with the texts of a corpus: word and character error rates.

    uv run python eval/asr.py --model_name models/tiny_text_speech --corpus "assets/tiny/corpus/validation-*.parquet"

The model is a Llama-Mimi model that was trained on the task 'asr', or any ASR model of transformers. Under torchrun,
the ranks share the work. To continue a killed run, run the command again.
"""

from llama_mimi.common.command_line import command
from llama_mimi.judging.options import AsrOptions

if __name__ == "__main__":
    with command(AsrOptions, __doc__) as options:
        from llama_mimi.judging.script import score_recogniser

        score_recogniser(options)
