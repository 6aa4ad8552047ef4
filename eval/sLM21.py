"""sLM21: sWUGGY (lexical) and sBLIMP (syntactic).

uv run python eval/sLM21.py --model_name models/tiny --data_dir assets/tiny/benchmarks/sLM21
"""

from llama_mimi.benchmarks import slm21_pairs
from llama_mimi.errors import run_cli
from llama_mimi.evaluation import run_benchmark

if __name__ == "__main__":
    run_cli(lambda: run_benchmark("sLM21", __doc__, "speed", slm21_pairs, scored="semantic"))
