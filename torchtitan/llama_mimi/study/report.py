"""Report of a study: a comparison for each of its tables."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import pandas as pd
from tqdm import tqdm

from llama_mimi.common.choices import Task
from llama_mimi.common.errors import UserError
from llama_mimi.common.files import write_atomically
from llama_mimi.report.comparisons import LEGEND_OF_STUDIES, ONE_RUN, comparison
from llama_mimi.report.document import Section, to_markdown, write_markdown
from llama_mimi.report.power import power_table
from llama_mimi.report.results import BITS, read_results
from llama_mimi.study.config import Run, Study, label
from llama_mimi.study.run import INDEX
from llama_mimi.training.metrics import BITS as BITS_KEY

REPORT, RESULTS = "report.md", "results.parquet"
COSTS = {  # rows of a table: key in the index, unit in FLOPs, name of the unit
    "training": ("flops", 1, "FLOP"),
    "generation of one second of audio": ("generation_flops_per_audio_second", 1e9, "GFLOP"),
}
Lines = Sequence[Mapping[str, Any]]  # lines of the index


def write_report(study: Study, lines: Lines) -> Path:
    """Write the report and its pictures into the study's folder; return the report's path."""
    write_markdown(sections(study, lines), study.output_dir / REPORT)
    return study.output_dir / REPORT


def sections(study: Study, lines: Lines) -> list[Section]:
    """Return the sections of the report."""
    items = _collect_results(study, lines)
    commits = sorted({line["commit"] for line in lines if line["commit"]})
    missing = [line for line in lines if line["state"] != "done"]
    about = (
        f"`uv run python scripts/study.py {study.path}`: {len(lines) - len(missing)} of {len(lines)} runs are done, "
        f"{len(study.seeds)} for each of {len(study.variants)} variants; commit {', '.join(commits) or 'unknown'}. "
        f"`index.jsonl` has the axes and the cost of each run. `{RESULTS}` has the values of all measures."
    )
    encoder = study.generation.get("speaker_model")
    notes = [study.note, f"Speaker encoder of the speaker similarity: `{encoder}`." if encoder else None]
    one_run = [ONE_RUN] if len(study.seeds) == 1 else []
    found = [Section(f"Study {study.name}", [about, *filter(None, notes), *LEGEND_OF_STUDIES, *one_run])]
    if missing:
        failed = {line["label"]: line["failed"] for line in missing}
        why = [f"{run}: {f['step']} failed: {f['why']}" if f else f"{run}: not finished" for run, f in failed.items()]
        found.append(Section("Runs without results", items=why))
    of_run = {line["run"]: line for line in lines}
    systems = {variant: [Run(variant, seed).name for seed in study.seeds] for variant in study.variants}
    for number, table in enumerate(tqdm(study.tables, "report", unit="table", delay=2), 1):
        groups = {label(variant, table.variants): systems[variant] for variant in table.variants}
        primary = table.primary and (table.primary[0], label(table.primary[1], table.variants))
        first_runs = {label: of_run[run] for label, (run, *_) in groups.items()}
        costs = {
            row: {label: f"{line[key] / unit:.3g} {name}" for label, line in first_runs.items() if line.get(key)}
            for row, (key, unit, name) in COSTS.items()
        }
        picture, all_groups = f"forest-{number}", systems.values()
        found.append(
            comparison(items, table.title, groups, picture, all_groups=all_groups, primary=primary, costs=costs)
        )
    return found


def _collect_results(study: Study, lines: Lines) -> pd.DataFrame:
    """Return the values of all measures: bits/s from the index ``lines``, and the others from `_saved_results`."""
    items = _saved_results(study)
    same = {"item": "", "cluster": "", "sample": 0, "conditions": "", "weights": "", "data": "", "is_reference": False}
    same["data_kind"] = items["data_kind"].iloc[0] if items["data_kind"].nunique() == 1 else "other"
    # For each validation corpus, each number of levels is a measure without items. Names are "all" (first corpus, first
    # task), "<corpus>/all", and for further tasks, which are not shown, "<task>/all" and "<corpus>/<task>/all".
    bits = [
        same
        | {
            "system": line["run"],
            "measure": f"{BITS}{line['num_quantizers']}/{name}".removesuffix("/all"),
            "value": value,
        }
        for line in lines
        for name, value in (line.get(BITS_KEY) or {}).items()
        if name.endswith("all") and name.count("/") < 2 and name.split("/")[0] not in get_args(Task)
    ]
    return pd.concat([items, pd.DataFrame(bits)], ignore_index=True) if bits else items


def _saved_results(study: Study) -> pd.DataFrame:
    """Read all values from the result files and save them as `RESULTS`. Without result files, read `RESULTS`."""
    folders = [folder for name in ("results", "generations") if (folder := study.output_dir / name).is_dir()]
    found = read_results(folders)
    if found.empty and (path := study.output_dir / RESULTS).is_file():
        return pd.read_parquet(path)
    write_atomically(str(study.output_dir), RESULTS, found.to_parquet(None, compression="zstd", index=False))
    return found


def power_report(study: Study) -> str:
    """Return the power of more seeds and items as Markdown, computed from the results and the index of the study."""
    index = study.output_dir / INDEX
    lines = [json.loads(line) for line in index.read_text().splitlines()] if index.is_file() else []
    if (items := _collect_results(study, lines)).empty:
        raise UserError(f"'{study.output_dir}' does not contain results; run the study first")
    tables = [[[Run(v, seed).name for seed in study.seeds] for v in table.variants] for table in study.tables]
    return to_markdown([power_table(items, tables, f"Power of the study {study.name}")])
