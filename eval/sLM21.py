"""Score a model on sLM21: sWUGGY (lexical pairs) and sBLIMP (syntactic pairs).

uv run python eval/sLM21.py --model_name models/tiny --data_dir assets/tiny/benchmarks/sLM21
"""

from llama_mimi.common.command_line import command
from llama_mimi.evaluation.options import EvaluationOptions

if __name__ == "__main__":
    with command(EvaluationOptions, __doc__) as options:
        from llama_mimi.evaluation.script import SLM21

        SLM21.run(options)
