"""Import codes that are stored as text, such as SODA's corpora, into shards of codes for training.

    uv run python scripts/import_codes.py --corpus data/yodas2-mm-pretrain/en000 --layout soda \\
        --codes_column text --codec_sliding_window unknown --output_dir data/codes/yodas_en000

The ranks of torchrun share the work. If a run is killed, re-run the command to write the missing shards.
"""

from llama_mimi.common.command_line import command
from llama_mimi.corpora.options import ImportOptions

if __name__ == "__main__":
    with command(ImportOptions, __doc__) as options:
        from llama_mimi.corpora.tokenize import tokenize_corpus

        tokenize_corpus(options)
