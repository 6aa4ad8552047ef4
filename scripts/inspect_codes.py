"""Write an HTML page about a tokenised corpus: decoded clips, and the use of codes at each level.

uv run python scripts/inspect_codes.py --codes data/codes/tiny --page outputs/codes_tiny.html
"""

from dataclasses import dataclass
from pathlib import Path

from llama_mimi.common.command_line import command


@dataclass
class Options:
    codes: str  # output folder of scripts/tokenize_corpus.py
    page: Path  # HTML file to write
    codec: str | None = None  # hub id or folder of the codec; default: the codec named in the manifest
    num_clips: int = 10  # number of clips to decode
    seed: int = 0  # random seed for the choice of clips


if __name__ == "__main__":
    with command(Options, __doc__) as options:
        from llama_mimi.report.pages import write_codes_page

        write_codes_page(**vars(options))
