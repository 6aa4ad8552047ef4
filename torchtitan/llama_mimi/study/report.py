"""The report of a study: a comparison for each of its tables, from the results of its runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from llama_mimi.report.comparisons import LEGEND, comparison, published_numbers, tradeoffs
from llama_mimi.report.document import Section, write_markdown
from llama_mimi.report.results import BITS, read_results, read_table, write_table
from llama_mimi.study.config import Run, Study
from llama_mimi.training.metrics import BITS as BITS_KEY

REPORT = "report.md"
RESULTS = "results.parquet"
PUBLISHED = Path("eval/published.toml")
ABOUT_BITS = (
    "Bits are over the tokens that can stand at a position: the codes of its level and, between frames, `</audio>`. "
    "Bits of models with different numbers of levels do not compare."
)
Lines = Sequence[Mapping[str, Any]]


def write_report(study: Study, lines: Lines) -> Path:
    """Write the report and its pictures into the study's folder, and return its path; `lines` are those of the index.

    Raises:
        UserError: a result cannot be read, or a file cannot be written.
    """
    write_markdown(sections(study, lines), study.output_dir / REPORT)
    return study.output_dir / REPORT


def sections(study: Study, lines: Lines) -> list[Section]:
    """Return the sections of the report; raises as `write_report`."""
    items = _with_bits(collect_results(study), lines)
    commits = sorted({line["commit"] for line in lines if line["commit"]})
    done = sum(line["state"] == "done" for line in lines)
    about = (
        f"`uv run python scripts/study.py {study.path}`: {done} of {len(lines)} runs are done, {len(study.seeds)} for "
        f"each of {len(study.variants)} variants; commit {', '.join(commits) or 'unknown'}. `index.jsonl` has the "
        f"settings and the cost of each run, `{RESULTS}` its values."
    )
    found = [Section(f"Study {study.name}", [about, *filter(None, [study.note]), *LEGEND, ABOUT_BITS])]
    if missing := [f"{line['label']}: {_why(line)}" for line in lines if line["state"] != "done"]:
        found.append(Section("Runs without results", items=missing))
    for number, table in enumerate(study.tables, 1):
        groups = {table.label(v): [Run(v, seed).name for seed in study.seeds] for v in table.variants}
        found.append(comparison(items, table.title, groups, f"forest-{number}"))
        pictures = tradeoffs(items, table.title, groups, f"tradeoff-{number}")
        found += [Section(f"{table.title}: trade-off", pictures=pictures)] if pictures else []
    return found + published_numbers(items, PUBLISHED)


def collect_results(study: Study) -> pd.DataFrame:
    """Return all values of the result files and write them to `RESULTS`; without such files, read `RESULTS`."""
    folders = [study.output_dir / name for name in ("results", "generations")]
    found = read_results([folder for folder in folders if folder.is_dir()]).items
    path = study.output_dir / RESULTS
    if found.empty and path.is_file():
        return read_table(path)
    write_table(found, path)
    return found


def _with_bits(items: pd.DataFrame, lines: Lines) -> pd.DataFrame:
    """Add the bits of runs, a measure without items for each number of levels."""
    kinds = items["data_kind"].unique()
    rows = [
        {
            "system": line["run"],
            "measure": f"{BITS}{line['num_quantizers']}",
            "item": "",
            "sample": 0,
            "value": bits["all"],
        }
        for line in lines
        if (bits := line.get(BITS_KEY))
    ]
    more = pd.DataFrame(rows).assign(
        conditions="", weights="", data="", data_kind=kinds[0] if len(kinds) == 1 else "other", is_reference=False
    )
    return pd.concat([items, more], ignore_index=True) if rows else items


def _why(line: Mapping[str, Any]) -> str:
    failed = line["failed"]
    return f"{failed['step']} failed: {failed['why']}" if failed else "not finished"
