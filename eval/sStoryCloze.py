"""Score a model on StoryCloze: correct story endings against wrong (sStoryCloze) or random (tStoryCloze) endings.

uv run python eval/sStoryCloze.py --model_name models/tiny --data_dir assets/tiny/benchmarks/storycloze
"""

from llama_mimi.evaluation.options import run_benchmark

if __name__ == "__main__":
    run_benchmark("sStoryCloze", __doc__)
