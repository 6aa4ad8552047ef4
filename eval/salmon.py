"""Score a model on SALMon: acoustic consistency and alignment.

uv run python eval/salmon.py --model_name models/tiny --data_dir assets/tiny/benchmarks/salmon
"""

from llama_mimi.common.command_line import command
from llama_mimi.evaluation.options import EvaluationOptions

if __name__ == "__main__":
    with command(EvaluationOptions, __doc__) as options:
        from llama_mimi.evaluation.script import SALMON

        SALMON.run(options)
