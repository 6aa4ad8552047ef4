"""StoryCloze: correct story endings against wrong endings (sStoryCloze) or random endings (tStoryCloze).

uv run python eval/sStoryCloze.py --model_name models/tiny --data_dir assets/tiny/benchmarks/storycloze
"""

from llama_mimi.common.command_line import run_command
from llama_mimi.evaluation.script import STORYCLOZE

if __name__ == "__main__":
    run_command(STORYCLOZE.run, __doc__)
