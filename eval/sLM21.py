"""Score a model on sLM21: sWUGGY (lexical pairs) and sBLIMP (syntactic pairs).

uv run python eval/sLM21.py --model_name models/tiny --data_dir assets/tiny/benchmarks/sLM21
"""

from llama_mimi.evaluation.options import run_benchmark

if __name__ == "__main__":
    run_benchmark("sLM21", __doc__)
