"""Score a model on SALMon: acoustic consistency and alignment.

uv run python eval/salmon.py --model_name models/tiny --data_dir assets/tiny/benchmarks/salmon
"""

from llama_mimi.evaluation.options import run_benchmark

if __name__ == "__main__":
    run_benchmark("salmon", __doc__)
