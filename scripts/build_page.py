"""A page with audio: prompts, recordings and the continuations of each model, and the report of a study.

uv run python scripts/build_page.py --generations results/generation --page results/generation.html
uv run python scripts/build_page.py --study config/studies/tiny.toml --page outputs/studies/tiny/page.html
"""

from dataclasses import replace
from pathlib import Path

from llama_mimi.common.command_line import run_command
from llama_mimi.common.cpu import use_cpu_without_gpu
from llama_mimi.common.errors import UserError
from llama_mimi.report.document import Section, write_html
from llama_mimi.report.pages import continuations


def build_page(
    page: Path,
    generations: Path | None = None,
    study: Path | None = None,
    num_prompts: int = 4,
    systems: tuple[str, ...] = (),
) -> None:
    """Write the page.

    Args:
        page: HTML file to write
        generations: the --output_dir of eval/generation.py
        study: or TOML file of a study
        num_prompts: number of prompts with audio, chosen by the hash of their names
        systems: systems with audio; by default all, or the runs of a study with its first seed

    Raises:
        UserError: there are no results, or they cannot be read.
    """
    if num_prompts < 0:
        raise UserError(f"--num_prompts is {num_prompts}; it must be 0 or more")
    if (generations is None) == (study is None):
        raise UserError("name either a --study or the folder of --generations")
    if study is not None:
        return write_html(f"Study {study.stem}", study_sections(study, num_prompts, systems), page)
    assert generations is not None
    sections = continuations(generations, num_prompts, {name: name for name in systems} or None)
    write_html(f"Continuations in {generations}", sections, page)


def study_sections(path: Path, num_prompts: int, systems: tuple[str, ...]) -> list[Section]:
    """Return the audio of a study's runs, and its report."""
    use_cpu_without_gpu()  # before any import of TorchTitan
    from llama_mimi.study.config import read_study
    from llama_mimi.study.report import sections
    from llama_mimi.study.run import write_index

    study = read_study(path)
    lines, folder = write_index(study), study.output_dir / "generations"
    labels = {line["run"]: line["label"] for line in lines}
    first_seed = [line["run"] for line in lines if line["seed"] == study.seeds[0]]
    shown = systems or [name for name in first_seed if (folder / f"{name}.json").is_file()]
    audio = continuations(folder, num_prompts, {name: labels.get(name, name) for name in shown}) if shown else []
    first, *others = sections(study, lines)
    return [*audio, replace(first, title="Report"), *others]


if __name__ == "__main__":
    run_command(build_page, __doc__)
