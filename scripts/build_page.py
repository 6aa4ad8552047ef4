"""A page to open and listen to: prompts, recordings and what each model makes of them, and the tables of a study.

    uv run python scripts/build_page.py --generations results/generation --page results/generation.html
    uv run python scripts/build_page.py --study config/studies/tiny.toml --page outputs/studies/tiny/page.html

It is one file, without scripts. A study's page begins with its tables, whose cells link to the results.
"""

import hashlib
import os
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from llama_mimi.common.cpu import use_cpu_without_gpu

use_cpu_without_gpu()  # before anything imports TorchTitan

import pages  # noqa: E402
from result_files import read_result  # noqa: E402
from study_report import Cell, sections  # noqa: E402

from llama_mimi.audio.reading import AudioError, read_audio  # noqa: E402
from llama_mimi.common.command_line import run_command  # noqa: E402
from llama_mimi.common.errors import UserError  # noqa: E402
from llama_mimi.common.files import read_json, visible_files  # noqa: E402
from llama_mimi.judging.prompts import MANIFEST  # noqa: E402
from llama_mimi.judging.systems import RECORDING, SHUFFLED  # noqa: E402
from llama_mimi.judging.table import COLUMNS, KIND, column_of, is_reference  # noqa: E402
from llama_mimi.study.config import Study, read_study  # noqa: E402
from llama_mimi.study.run import write_index  # noqa: E402

RATE_HZ = 24_000
ROUNDING_SECONDS = 0.1
# Of the measures of a sample, those that say something of one alone.
SHOWN = ("similarity", "distillmos", "words_per_minute")


def build_page(
    page: Path,
    generations: Path | None = None,
    study: Path | None = None,
    num_prompts: int = 8,
    systems: tuple[str, ...] = (),
    title: str | None = None,
) -> None:
    """Write the page.

    Args:
        page: HTML file to write
        generations: the --output_dir of eval/generation.py
        study: or TOML file of a study
        num_prompts: that can be heard, drawn by the hash of their names
        systems: whose continuations can be heard; by default all, of a study those with its first seed
        title: of the page

    Raises:
        UserError: there are no results, or they cannot be read.
    """
    if num_prompts < 0:
        raise UserError(f"--num_prompts is {num_prompts}; it must be 0 or more")
    if (generations is None) == (study is None):
        raise UserError("name either a --study or the folder of --generations")
    if study is None:
        assert generations is not None
        return pages.write_page(
            page, title or f"Continuations in {generations}", heard(generations, systems, num_prompts)
        )
    chosen = read_study(study)
    parts, folder = of_study(chosen, page), chosen.output_dir / "generations"
    first = [run.name for run in chosen.runs if run.seed == chosen.seeds[0]]
    judged = tuple(name for name in first if (folder / f"{name}.json").is_file())
    if num_prompts and (wanted := systems or judged):
        parts += heard(folder, wanted, num_prompts)
    pages.write_page(page, title or f"Study {chosen.name}", parts)


def of_study(study: Study, page: Path) -> list[str]:
    """Its report as HTML; links are relative to where the page will lie."""
    root = os.path.relpath(study.output_dir, page.parent)
    parts = []
    for number, section in enumerate(sections(study, write_index(study))):
        parts += [f"<h2>{escape(section.title)}</h2>"] if number else []
        parts += [f"<p>{_with_code(text)}</p>" for text in section.texts]
        items = "".join(f"<li>{escape(item)}</li>" for item in section.items)
        parts += [f"<ul>{items}</ul>"] if items else []
        for header, *rows in section.tables:
            heads = [cell.text for cell in header]
            html = [
                [_html(cell, root, f"{row[0].text}, {head}") for cell, head in zip(row, heads, strict=True)]
                for row in rows
            ]
            parts.append(pages.table_of_html(html, heads, label=f"{section.title}: {heads[0]}"))
        if section.picture:
            parts.append(pages.picture((study.output_dir / section.picture).read_bytes(), section.seen))
    return parts


def _html(cell: Cell, root: str, where: str) -> str:
    links = [
        f'<a href="{quote(os.path.join(root, path))}" aria-label="{escape(f"{where}: {name}")}">{escape(name)}</a>'
        for name, path in cell.links.items()
    ]
    return " ".join([escape(cell.text), *links])


def _with_code(text: str) -> str:
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))


def heard(folder: Path, systems: Sequence[str], num_prompts: int) -> list[str]:
    """A few prompts, each with all systems side by side.

    Raises:
        UserError: a system that is not there, or audio that cannot be read.
    """
    prompts = sorted(
        read_manifest(folder)["prompts"], key=lambda prompt: hashlib.sha256(prompt["name"].encode()).digest()
    )
    found = filter(None, map(read_result, visible_files(folder, "*.json")))
    reports = {report["system"]: report for report in found if report.get("kind") == KIND}
    if missing := [name for name in systems if name not in reports]:
        raise UserError(f"'{folder}' has no result of '{missing[0]}', only of {', '.join(reports) or 'none'}")
    if RECORDING not in reports:
        raise UserError(f"'{folder}' has no result of '{RECORDING}'; judge a model with eval/generation.py first")
    references = [name for name, report in reports.items() if is_reference(report["samples"])]
    own = [name for name in systems or reports if name not in references]
    shown = [RECORDING, *(name for name in references if name not in (RECORDING, SHUFFLED)), *own]
    parts = [
        f"<h2>{min(num_prompts, len(prompts))} of {len(prompts)} prompts</h2>",
        "<p>Each clip begins with its prompt; the line in its spectrogram is where that ends. Transcripts are a "
        "recogniser's, of what comes after. Of several continuations the first is here.</p>",
    ]
    for prompt in prompts[:num_prompts]:
        speaker = f", speaker {prompt['speaker']}" if prompt["speaker"] else ""
        text = next(
            (s.get("prompt_text") for s in reports[RECORDING]["samples"] if s["prompt"] == prompt["name"]), None
        )
        parts.append(f"<h3>{escape(prompt['name'] + speaker)}</h3>")
        parts += [f"<p>Prompt: {escape(text)}</p>"] if text else []
        parts.append(pages.cards(clip for name in shown if (clip := _card(folder, name, reports[name], prompt))))
    return parts


def read_manifest(folder: Path) -> dict[str, Any]:
    manifest = read_json(str(folder), MANIFEST)
    if manifest is None:
        raise UserError(f"'{folder}' holds no {MANIFEST}; name the --output_dir of eval/generation.py")
    return manifest


def _card(folder: Path, system: str, report: dict[str, Any], prompt: dict[str, Any]) -> str | None:
    samples = [sample for sample in report["samples"] if sample["prompt"] == prompt["name"]]
    if not samples:
        return None
    first = min(samples, key=lambda sample: sample["sample"] or 0)
    end = prompt["seconds"] + first["seconds"] + ROUNDING_SECONDS
    try:
        samples_S = read_audio(folder / first["file"], RATE_HZ, max_seconds=end).samples_S
    except AudioError as error:
        if error.reason == "empty":
            return f'<section class="card"><h4>{escape(system)}</h4><p>says nothing</p></section>'
        raise UserError(f"a continuation of '{system}' cannot be heard: {error}") from error
    holds_prompt = len(samples_S) / RATE_HZ > prompt["seconds"] + first["seconds"] - ROUNDING_SECONDS
    lines = [first["text"]] if first.get("text") else []
    measures = [name for name in first if name in SHOWN or name.startswith("judge/")]
    order = [name for name in COLUMNS if name in measures] + sorted(set(measures) - COLUMNS.keys())
    values = [
        f"{column_of(name).heading} {first[name]:.{column_of(name).digits}f}"
        for name in order
        if first[name] is not None
    ]
    lines += [", ".join(values)] if values else []
    return pages.card(system, samples_S, RATE_HZ, lines, prompt["seconds"] if holds_prompt else None)


if __name__ == "__main__":
    run_command(build_page, __doc__)
