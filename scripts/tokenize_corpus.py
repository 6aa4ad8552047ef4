"""Tokenise a corpus: encode audio to shards of Mimi codes for training.

    uv run torchrun --standalone --nproc_per_node=2 scripts/tokenize_corpus.py \\
        --corpus "assets/tiny/corpus/train-*.parquet" \\
        --codec assets/tiny/mimi --output_dir data/codes/tiny

Ranks share the work. If a run is killed, re-run the command on any number of ranks to write the missing shards.
"""

from llama_mimi.common.command_line import run_command
from llama_mimi.corpora.tokenize import tokenize_corpus

if __name__ == "__main__":
    run_command(tokenize_corpus, __doc__)
