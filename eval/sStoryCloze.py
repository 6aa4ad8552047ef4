"""StoryCloze: does a story go on as it should.

uv run python eval/sStoryCloze.py --model_name models/tiny --data_dir assets/tiny/benchmarks/storycloze
"""

from llama_mimi.benchmarks import storycloze_pairs
from llama_mimi.errors import run_cli
from llama_mimi.evaluation import run_benchmark

if __name__ == "__main__":
    run_cli(lambda: run_benchmark("sStoryCloze", __doc__, "speed", storycloze_pairs, scored="semantic"))
