"""A line of JSON for each run of a study: what was trained on what, what it cost, and how it scored."""

import hashlib
import json
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llama_mimi.checkpoint.conversion import JOB_CONFIG, NOT_OF_THE_MODEL
from llama_mimi.common.errors import UserError
from llama_mimi.common.files import digest, read_json, write_atomically
from llama_mimi.data.code_store import MANIFEST
from llama_mimi.judging.table import means
from llama_mimi.study.budget import cost_of_step, decay_begins
from llama_mimi.study.design import Run
from llama_mimi.study.workplace import TRAIN, Workplace
from llama_mimi.training.metrics import BITS

INDEX = "index.jsonl"
SCORE_KEYS = ("accuracy", "interval", "count")


def write_index(place: Workplace) -> list[dict[str, Any]]:
    """Write what is known of every run of a study to its `INDEX`, and return it in the order of the study.

    Raises:
        UserError: a result file cannot be read.
    """
    costs = {arm: cost_of_step(place.study.flags(arm), place.study.launch.nproc_per_node) for arm in place.study.arms}
    lines = [_line(place, run, costs[run.arm].flops) for run in place.study.runs]
    content = "".join(json.dumps(line) + "\n" for line in lines)
    write_atomically(str(place.study.output_dir), INDEX, content.encode())
    return lines


def _line(place: Workplace, run: Run, flops_of_step: float) -> dict[str, Any]:
    record, folder = place.record(run), place.folder(run) / "run"
    config = read_json(str(folder), JOB_CONFIG)
    results = {
        name: read_json(str(path.parent), path.name)
        for name in place.study.benchmarks
        if (path := place.result(run, name))
    }
    found = {name: result for name, result in results.items() if result is not None}
    generation = read_json(str(place.generations), f"{run.name}.json")
    wanted = len(place.study.benchmarks) + bool(place.study.generation)
    is_done = TRAIN in record["seconds"] and len(found) + (generation is not None) == wanted
    first = next(iter(found.values()), {})
    files = {name: place.result(run, name) for name in found}
    if generation is not None:
        files["generation"] = place.generation(run)
    return {
        "study": place.study.name,
        "run": run.name,
        **vars(run.arm),
        "seed": run.seed,
        "state": "failed" if record["failed"] else "done" if is_done else "unfinished",
        "failed": record["failed"],
        "config_sha256": None
        if config is None
        else digest({k: v for k, v in config.items() if k not in NOT_OF_THE_MODEL}),
        "data_sha256": None if config is None else _data_sha256(config["training"]["dataset"]),
        "codec_sha256": first.get("codec", {}).get("sha256"),
        "model_sha256": first.get("model_sha256"),
        "commit": first.get("versions", {}).get("commit"),
        "flops": flops_of_step * run.arm.steps,
        "seconds": _trunk_seconds(place, run) | record["seconds"],
        BITS: validation_bits(folder, run.arm.steps),
        "scores": {
            f"{name}/{part}": {key: result[key] for key in SCORE_KEYS}
            for name, report in found.items()
            for part, result in report["parts"].items()
        },
        "generations": {}
        if generation is None
        else {name: of[run.name] for name, of in means({run.name: generation["samples"]}).items()},
        "files": {name: str(path.relative_to(place.study.output_dir)) for name, path in files.items()},
    }


def _trunk_seconds(place: Workplace, run: Run) -> dict[str, float]:
    """Of the trunk up to where a run leaves it, which other runs share."""
    begin = decay_begins(place.study.flags(run.arm), run.arm.steps)
    trained = place.record(Run(run.arm.trunk, run.seed))["seconds"]
    return {step: seconds for step, seconds in trained.items() if int(step.rpartition("-")[2]) <= begin}


def _data_sha256(dataset: str) -> str:
    """Of what names the training data: manifests of tokenised corpora, and else their names."""
    parts = [part.strip() for part in dataset.split(",")]
    manifests = [Path(part) / MANIFEST for part in parts]
    return digest(
        [
            hashlib.sha256(m.read_bytes()).hexdigest() if m.is_file() else p
            for m, p in zip(manifests, parts, strict=True)
        ]
    )


def validation_bits(folder: Path, step: int) -> dict[str, float]:
    """Return the bits per second over admissible tokens at the validation of a step, by level and of all levels.

    Runs of earlier versions did not log them, so that the result is empty.
    """
    bits: dict[str, float] = {}
    prefix = f"validation_{BITS}/"
    for log in sorted((folder / "tb").rglob("events*"), key=lambda log: log.name):  # one for each start
        try:
            events = EventAccumulator(str(log))
            events.Reload()
        except Exception as error:  # TensorBoard raises what a file that was cut off makes of it
            raise UserError(f"the log '{log}' cannot be read ({error}); remove it") from error
        for tag in events.Tags()["scalars"]:
            if tag.startswith(prefix):
                bits |= {tag.removeprefix(prefix): event.value for event in events.Scalars(tag) if event.step == step}
    return bits
