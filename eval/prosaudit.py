"""Score a model on ProsAudit: a pause at a natural place of a sentence against a pause at an unnatural place.

uv run python eval/prosaudit.py --model_name models/tiny --data_dir assets/tiny/benchmarks/prosaudit
"""

from llama_mimi.evaluation.options import run_benchmark

if __name__ == "__main__":
    run_benchmark("prosaudit", __doc__)
