"""Tokenise a corpus: encode audio to shards of Mimi codes for training.

    uv run torchrun --standalone --nproc_per_node=2 scripts/tokenize_corpus.py \\
        --corpus "assets/tiny/corpus/train-*.parquet" \\
        --codec assets/tiny/mimi --output_dir data/codes/tiny

The ranks share the work. If a run is killed, re-run the command on any number of ranks to write the missing shards.
"""

from llama_mimi.common.command_line import command
from llama_mimi.corpora.options import TokenizationOptions

if __name__ == "__main__":
    with command(TokenizationOptions, __doc__) as options:
        from llama_mimi.corpora.tokenize import tokenize_corpus

        tokenize_corpus(options)
