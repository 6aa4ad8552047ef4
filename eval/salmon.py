"""SALMon: acoustic consistency and alignment.

uv run python eval/salmon.py --model_name models/tiny --data_dir assets/tiny/benchmarks/salmon
"""

from llama_mimi.benchmarks import salmon_pairs
from llama_mimi.errors import run_cli
from llama_mimi.evaluation import run_benchmark

if __name__ == "__main__":
    run_cli(lambda: run_benchmark("salmon", __doc__, "slprl/SALMon", salmon_pairs, scored="all"))
