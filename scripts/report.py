"""Report results of eval/: means, and differences between models.

    uv run python scripts/report.py --results results --output_file results/report.md

The report compares models that were scored with the same settings on the same audio, or that continued the same
prompts.
"""

from dataclasses import dataclass
from pathlib import Path

from llama_mimi.common.command_line import command


@dataclass
class Options:
    results: tuple[Path, ...] = (Path("results"),)  # folders of result files
    output_file: Path | None = None  # Markdown file to write; pictures go to its folder; default: print the text


if __name__ == "__main__":
    with command(Options, __doc__) as options:
        from llama_mimi.report.comparisons import report_results

        report_results(**vars(options))
