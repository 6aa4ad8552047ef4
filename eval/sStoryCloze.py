"""Score a model on StoryCloze: correct story endings against wrong (sStoryCloze) or random (tStoryCloze) endings.

uv run python eval/sStoryCloze.py --model_name models/tiny --data_dir assets/tiny/benchmarks/storycloze
"""

from llama_mimi.common.command_line import command
from llama_mimi.evaluation.options import EvaluationOptions

if __name__ == "__main__":
    with command(EvaluationOptions, __doc__) as options:
        from llama_mimi.evaluation.script import STORYCLOZE

        STORYCLOZE.run(options)
