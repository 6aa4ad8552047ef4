"""SALMon: acoustic consistency and alignment.

uv run python eval/salmon.py --model_name models/tiny --data_dir assets/tiny/benchmarks/salmon
"""

from llama_mimi.common.command_line import run_command
from llama_mimi.evaluation.script import SALMON

if __name__ == "__main__":
    run_command(SALMON.run, __doc__)
