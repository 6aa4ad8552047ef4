"""Run the commands of a study (train, convert, score, judge) and write its index."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from llama_mimi.common.command_line import to_cli_args
from llama_mimi.common.distributed import end_with_parent
from llama_mimi.common.errors import UserError
from llama_mimi.common.files import LOCK, locked, read_json, write_atomically
from llama_mimi.common.resume import require_same
from llama_mimi.evaluation.script import BENCHMARK_SCRIPTS
from llama_mimi.report.curves import read_curves
from llama_mimi.study.budget import cost, resolved
from llama_mimi.study.config import Flags, Launch, Run, Study, label
from llama_mimi.training.metrics import BITS

INDEX, RECORD = "index.jsonl", "record.json"
TRAIN, GENERATION = "train", "generation"
_stopping = threading.Event()  # set after an interrupt


class Step(NamedTuple):
    """A command of a run: training, conversion, a benchmark or judging."""

    name: str
    program: list[str]
    flags: Flags
    output: Path  # file or folder that the command writes


def steps(study: Study, run: Run) -> list[Step]:
    """Return the commands of a run, in order."""
    python, num_ranks, out = [sys.executable], study.launch.nproc_per_node, study.output_dir
    torchrun = [*python, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
    ranks, trainer = torchrun if num_ranks > 1 else python, study.launch.train or [*torchrun, "-m", "llama_mimi.train"]
    folder, model = f"{run_folder(study, run)}/run", f"{out}/models/{run.name}"
    num_steps, flags = run.variant.steps, study.flags(run.variant)
    checkpoint = f"{folder}/checkpoint/step-{num_steps}"
    # The validation frequency divides the number of steps, so that a run ends with a validation.
    frequencies = range(min(resolved(flags).validation.freq, num_steps), num_steps + 1)
    training = flags | {"debug.seed": run.seed, "training.steps": num_steps, "job.dump_folder": folder}
    training["validation.freq"] = next(freq for freq in frequencies if num_steps % freq == 0)
    conversion = {"checkpoint": checkpoint, "output_dir": model}
    scoring = {"model_name": model, "output_dir": f"{out}/results", "codes_dir": f"{out}/clip_codes"}
    judging = study.generation | {"model_name": model, "output_dir": f"{out}/generations", "name": run.name}
    found = [
        Step(TRAIN, trainer, training, Path(checkpoint)),
        Step("convert", [*python, "scripts/convert_dcp_to_hf.py"], conversion, Path(model, "config.json")),
    ]
    for name, options in study.benchmarks.items():
        own = replace(study.evaluations[name], model_name=model, output_dir=out / "results")
        output = BENCHMARK_SCRIPTS[name].result_path(own)
        found.append(Step(name, [*ranks, f"eval/{name}.py"], options | scoring, output))
    if study.generation:
        found.append(Step(GENERATION, [*ranks, "eval/generation.py"], judging, out / f"generations/{run.name}.json"))
    return found


def run_folder(study: Study, run: Run) -> Path:
    """Return the folder for a run's training, logs and record."""
    return study.output_dir / "runs" / run.name


def read_record(study: Study, run: Run) -> dict[str, Any]:
    """Return a run's record: settings of started steps, seconds of finished steps, and the failed step."""
    return {"settings": {}, "seconds": {}, "failed": None} | (read_json(str(run_folder(study, run)), RECORD) or {})


def _settings(study: Study, run: Run, step: Step) -> Flags:
    """Return the settings that must not change after the start of a step."""
    config = Path(study.config[run.variant.architecture]).read_bytes()
    return step.flags | {"SHA-256 of the config": sha256(config).hexdigest()}


def check_unchanged(study: Study) -> None:
    """Raise a `UserError` if flags or config files have changed since a run was started."""
    for run in study.runs:
        record = read_record(study, run)
        for step in steps(study, run):
            if saved := record["settings"].get(step.name):
                current = dict.fromkeys(saved) | _settings(study, run, step)  # removed flags become None
                what = f"the step '{step.name}' of {run.name}"
                require_same(saved, current, what, "restore this value, or choose another output_dir")


def train_and_score(study: Study, runs: Sequence[Run]) -> None:
    """Train, convert and score runs, with ``launch.parallel`` runs at a time."""

    def work(run: Run) -> None:
        with locked(study.output_dir / "runs" / f".{run.name}{LOCK}", "output_dir", wait=True):
            _run(study, run, [step for step in steps(study, run) if step.name != GENERATION])

    with ThreadPoolExecutor(study.launch.parallel) as pool:
        try:
            list(pool.map(work, runs))
        except BaseException:  # for example an interrupt, which also ends the running commands
            _stopping.set()
            raise


def judge(study: Study) -> None:
    """Judge the continuations of all scored runs, one run at a time, because runs share prompts."""
    with locked(study.output_dir / f".generations{LOCK}", "output_dir", wait=True):
        for run in study.runs:
            if study.generation and read_record(study, run)["failed"] is None:
                _run(study, run, steps(study, run)[-1:])


def _run(study: Study, run: Run, todo: Sequence[Step]) -> None:
    """Run commands. Finished commands are not repeated. The first failure is recorded and ends the run."""
    failed, record, folder = None, read_record(study, run), run_folder(study, run)

    def save() -> None:
        write_atomically(str(folder), RECORD, json.dumps(record, indent=1).encode())

    for step in todo:
        if step.name in record["seconds"] and step.output.exists():
            continue
        if _stopping.is_set():
            return
        if step.name == TRAIN:  # a killed run may lack its last validation
            shutil.rmtree(step.output, ignore_errors=True)
        record["settings"][step.name] = _settings(study, run, step)
        save()
        began, log = time.monotonic(), folder / f"logs/{step.name}.log"
        print(f"{run.name}: {step.name} has started; its log is '{log}'", flush=True)
        try:
            start(study.launch, step.name, log, [*step.program, *to_cli_args(step.flags)])
        except (UserError, OSError) as error:
            if _stopping.is_set():
                return
            failed = {"step": step.name, "why": str(error)}
            print(f"{run.name}: {step.name} failed: {error}", flush=True)
            break
        record["seconds"][step.name] = round(time.monotonic() - began, 1)
        save()
        num_done = sum(len(read_record(study, one)["seconds"]) for one in study.runs)
        print(f"{run.name}: {step.name} is done; {num_done} steps of {len(study.runs)} runs are done", flush=True)
    record["failed"] = failed
    save()


def start(launch: Launch, name: str, log: Path, command: list[str]) -> None:
    """Run a command; end the command if this process ends. Raise a `UserError` if the command fails."""
    # Only one run is judged at a time, so judging may use the threads of all parallel runs.
    threads = launch.threads and launch.threads * (launch.parallel if name == GENERATION else 1)
    env = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        done = subprocess.run(command, stdout=output, stderr=output, env=env, preexec_fn=end_with_parent)
    if done.returncode:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error: ")] or lines[-5:]
        raise UserError(" / ".join(errors)[-600:] or f"the command ended with exit code {done.returncode}")


def write_index(study: Study) -> list[dict[str, Any]]:
    """Write a JSON line for each run into `INDEX`; return the lines."""
    lines, tag = [], f"validation_{BITS}/"
    costs = {variant: cost(study.flags(variant), study.launch.nproc_per_node) for variant in study.variants}
    for run in study.runs:
        record, (_, _, *scoring) = read_record(study, run), steps(study, run)
        found = [result for step in scoring if (result := read_json(str(step.output.parent), step.output.name))]
        is_done = TRAIN in record["seconds"] and len(found) == len(scoring)
        scored, num_steps = found[0] if found and study.benchmarks else {}, run.variant.steps
        curves = read_curves(run_folder(study, run) / "run")
        line = {
            "study": study.name,
            "run": run.name,
            "label": f"{label(run.variant, study.variants)}, seed {run.seed}",  # name in reports
            **run.variant._asdict(),
            "seed": run.seed,
            "state": "failed" if record["failed"] else "done" if is_done else "unfinished",
            "failed": record["failed"],
            "model_sha256": scored.get("model_sha256"),
            "commit": scored.get("versions", {}).get("commit"),
            "flops": num_steps * costs[run.variant].step_flops,
            "generation_flops_per_audio_second": costs[run.variant].generation_flops,
            "seconds": record["seconds"],
            # Values of the last step, by level and for all levels.
            BITS: {
                t.removeprefix(tag): c[num_steps] for t, c in curves.items() if t.startswith(tag) and num_steps in c
            },
        }
        lines.append(line)
    write_atomically(str(study.output_dir), INDEX, "".join(json.dumps(line) + "\n" for line in lines).encode())
    return lines
