"""Score a model on ProsAudit: a pause at a natural place of a sentence against a pause at an unnatural place.

uv run python eval/prosaudit.py --model_name models/tiny --data_dir assets/tiny/benchmarks/prosaudit
"""

from llama_mimi.common.command_line import command
from llama_mimi.evaluation.options import EvaluationOptions

if __name__ == "__main__":
    with command(EvaluationOptions, __doc__) as options:
        from llama_mimi.evaluation.script import PROSAUDIT

        PROSAUDIT.run(options)
