"""Build a page with audio: continuations of each model, the report of a study, or clips of a tokenised corpus.

    uv run python scripts/build_page.py --generations results/generation --page results/generation.html
    uv run python scripts/build_page.py --study config/studies/tiny.toml --page outputs/studies/tiny/page.html
    uv run python scripts/build_page.py --codes data/codes/tiny --page outputs/codes_tiny.html

The page is one file that contains its audio and pictures.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from llama_mimi.common.command_line import run_command
from llama_mimi.common.errors import UserError


def build_page(
    page: Path,
    generations: Path | None = None,
    study: Path | None = None,
    codes: Path | None = None,
    num_prompts: int = 4,
) -> None:
    """Write an HTML page with audio. Set one of the flags --generations, --study and --codes.

    Args:
        page: HTML file to write
        generations: --output_dir of eval/generation.py; the page shows all systems in this folder
        study: TOML file of a study; the page shows the runs with the first seed
        codes: --output_dir of scripts/tokenize_corpus.py; the page shows clips, and the use of codes at each level
        num_prompts: number of prompts, selected by the hashes of their names; with --codes: number of random clips
    """
    if [generations, study, codes].count(None) != 2:
        raise UserError("set one of the flags --generations, --study and --codes")
    from llama_mimi.report.document import write_html
    from llama_mimi.report.pages import code_sections, continuations

    if generations is not None:
        write_html(f"Continuations in {generations}", continuations(generations, num_prompts), page)
    if study is not None:
        write_html(f"Study {study.stem}", study_sections(study, num_prompts), page)
    if codes is not None:
        write_html(f"Codes in {codes}", code_sections(str(codes), num_prompts), page)


def study_sections(path: Path, num_prompts: int) -> list[Any]:
    """Return the sections of a page: the audio of a study's runs, and the study's report."""
    from llama_mimi.common.cpu import use_cpu_without_gpu

    use_cpu_without_gpu()  # before any import of TorchTitan
    from llama_mimi.report.pages import continuations
    from llama_mimi.study.config import read_study
    from llama_mimi.study.report import sections
    from llama_mimi.study.run import write_index

    study = read_study(path)
    lines, folder = write_index(study), study.output_dir / "generations"
    labels = {line["run"]: line["label"] for line in lines if line["seed"] == study.seeds[0]}
    shown = {run: label for run, label in labels.items() if (folder / f"{run}.json").is_file()}
    first, *others = sections(study, lines)
    return [*(continuations(folder, num_prompts, shown) if shown else ()), replace(first, title="Report"), *others]


if __name__ == "__main__":
    run_command(build_page, __doc__)
