"""Report results of eval/: means, differences between models and published numbers.

    uv run python scripts/report.py --results results --output_file results/report.md

Models are compared if they were scored with the same settings on the same audio, or have continued the same prompts.
"""

from pathlib import Path

from llama_mimi.common.command_line import run_command
from llama_mimi.common.errors import UserError
from llama_mimi.report.comparisons import LEGEND, comparable_sets, comparison, published_numbers, sign_tests, summary
from llama_mimi.report.document import Section, to_markdown, write_markdown
from llama_mimi.report.results import read_results


def report(results: tuple[Path, ...] = (Path("results"),), output_file: Path | None = None) -> None:
    """Write a report.

    Args:
        results: folders of result files
        output_file: Markdown file, with pictures in the same folder; default: print the text
    """
    found = read_results(results)
    if found.items.empty:
        raise UserError(f"there is no result file in {', '.join(map(str, results))}; run the scripts in eval/ first")
    sections: list[Section] = []
    for number, (title, items) in enumerate(comparable_sets(found.items), 1):
        picture = f"{output_file.stem}-{number}" if output_file else None
        sections.append(summary(items, title, picture))
        groups = {system: [system] for system in items["system"][~items["is_reference"]].unique()}
        if len(groups) > 1:
            sections.append(comparison(items, f"Differences, {title}", groups, picture and f"{picture}-differences"))
            sections += sign_tests(items, f"Tests, {title}")
    legend = LEGEND if any(section.title.startswith("Differences") for section in sections) else ()
    sections = [Section("Results", legend, items=found.notes), *sections, *published_numbers(found.items)]
    if output_file is None:
        return print(to_markdown(sections))
    write_markdown(sections, output_file)
    print(f"written to {output_file}")


if __name__ == "__main__":
    run_command(report, __doc__)
