"""sLM21: sWUGGY (lexical) and sBLIMP (syntactic).

uv run python eval/sLM21.py --model_name models/tiny --data_dir assets/tiny/benchmarks/sLM21
"""

from llama_mimi.common.command_line import run_command
from llama_mimi.evaluation.script import SLM21

if __name__ == "__main__":
    run_command(SLM21.run, __doc__)
