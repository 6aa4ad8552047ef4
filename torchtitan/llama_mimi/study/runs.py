"""The way of each run: training, conversion, scores, continuations judged.

Every step is a command that a user could start, with its output in a log beside. What is finished is kept, so that a
study that was killed goes on; a step that fails makes its run a hole with a name, and the others go on.
"""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llama_mimi.checkpoint.dcp import complete_steps
from llama_mimi.common.errors import UserError
from llama_mimi.common.files import read_json, write_atomically
from llama_mimi.common.ranks import end_with_parent
from llama_mimi.study.budget import decay_begins
from llama_mimi.study.design import Arm, Run, Study
from llama_mimi.training.config_file import as_words, parse_config

RECORD = "record.json"
LAST_LINES = 5  # of a log, that say why a step failed
Flags = Mapping[str, Any]


class StepFailed(Exception):
    """A command of a run failed; the message is the end of its log."""


class Workplace:
    """Where the parts of a study lie, and how its commands are started.

    Args:
        study: as its file says it.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        self.results = study.output_dir / "results"
        self.generations = study.output_dir / "generations"

    def folder(self, run: Run) -> Path:
        """Of a run's training, logs and record."""
        return self.study.output_dir / "runs" / run.name

    def model(self, run: Run) -> Path:
        return self.study.output_dir / "models" / run.name

    def result(self, run: Run, benchmark: str) -> Path:
        flags = self.study.benchmarks[benchmark]
        limit = f"-limit_{flags['limit']}" if "limit" in flags else ""
        return self.results / benchmark / run.name / f"{flags.get('preset', 'official')}{limit}.json"

    def generation(self, run: Run) -> Path:
        return self.generations / f"{run.name}.json"

    def record(self, run: Run) -> dict[str, Any]:
        """What is known of a run: seconds by step, and where it failed, if it did."""
        return read_json(str(self.folder(run)), RECORD) or {"seconds": {}, "failed": None}

    def note(self, run: Run, **values: Any) -> None:
        record = self.record(run) | values
        write_atomically(str(self.folder(run)), RECORD, (json.dumps(record, indent=1) + "\n").encode())

    def python(self, script: str, **flags: Any) -> list[str]:
        """A script of this repository on the ranks of this machine."""
        return [*self._ranks(), script, *as_words(flags)]

    def training(self, flags: Flags) -> list[str]:
        start = self.study.launch.train or [*self._ranks(always=True), "-m", "llama_mimi.train"]
        return [*start, *as_words(flags)]

    def _ranks(self, *, always: bool = False) -> list[str]:
        nproc = self.study.launch.nproc_per_node
        if nproc == 1 and not always:
            return [sys.executable]
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]

    def start(self, run: Run, step: str, command: list[str]) -> None:
        """Do a step of a run to its end, and note how long it took.

        Raises:
            StepFailed: the command did.
        """
        began = time.monotonic()
        self.command(self.folder(run) / "logs" / f"{step}.log", command)
        seconds = self.record(run)["seconds"]
        self.note(run, seconds=seconds | {step: round(seconds.get(step, 0) + time.monotonic() - began, 1)})

    def command(self, log: Path, command: list[str]) -> None:
        """Start a command and wait for it; it ends with this process, also if that is killed.

        Raises:
            StepFailed: it did.
        """
        threads = self.study.launch.threads
        env = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as output:
            done = subprocess.run(command, stdout=output, stderr=output, env=env, preexec_fn=end_with_parent)
        if done.returncode:
            said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            errors = [line for line in said if line.startswith("error: ")] or said[-LAST_LINES:]
            raise StepFailed(" / ".join(errors)[-600:] or f"it ended with {done.returncode}")


def make_ready(place: Workplace) -> None:
    """Do what must be there before the first run, once, whoever comes first.

    Raises:
        UserError: a command failed.
    """
    with locked(place.study.output_dir / ".before.lock"):
        for number, before in enumerate(place.study.before):
            if Path(before.makes).exists():
                continue
            print(f"before the runs: {' '.join(before.command)}", flush=True)
            log = place.study.output_dir / "logs" / f"before-{number}.log"
            try:
                place.command(log, [*place.python(before.command[0]), *before.command[1:]])
            except StepFailed as error:
                raise UserError(f"`{' '.join(before.command)}` failed (see '{log}'): {error}") from error
            if not Path(before.makes).exists():
                raise UserError(
                    f"`{' '.join(before.command)}` did not make '{before.makes}'; mend [[before]] of the study"
                )


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait until no other process holds a file, and hold it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def run_families(place: Workplace, numbers: list[int]) -> None:
    """Train, convert and score families of runs, several at a time, and print what becomes of them."""
    families = place.study.families
    with ThreadPoolExecutor(place.study.launch.parallel) as pool:
        for done in [pool.submit(run_family, place, *families[number]) for number in numbers]:
            done.result()


def run_family(place: Workplace, trunk: Arm, seed: int, arms: list[Arm]) -> None:
    """Runs that differ in their steps alone: up to where its decay begins, each is the trunk of all of them."""
    with locked(place.study.output_dir / "runs" / f".{Run(trunk, seed).name}.lock"):
        for arm in arms:
            run = Run(arm, seed)
            try:
                train(place, run, trunk, arms)
                score(place, run)
            except StepFailed as error:
                fail(place, run, error)
            else:
                place.note(run, failed=None)
                print(f"{run.name}: trained and scored", flush=True)


def train(place: Workplace, run: Run, trunk: Arm, arms: list[Arm]) -> None:
    """Train a run to its end, from the trunk's checkpoint where its decay begins if it is one of several.

    The schedule of TorchTitan depends on the step and the total alone, so that this is what a run of its own from the
    beginning would be.

    Raises:
        StepFailed: the trunk's training, or this.
    """
    arm, flags = run.arm, place.study.flags(run.arm)
    folder = place.folder(run) / "run"
    if is_trained(folder, arm.steps):
        return
    if len(arms) > 1:
        begin = decay_begins(flags, arm.steps)
        if begin and not (folder / "checkpoint").exists():
            of_trunk = place.folder(Run(trunk, run.seed)) / "run"
            if not is_trained(of_trunk, begin):
                total = max(arm.steps for arm in arms)
                more = {"lr_scheduler.total_steps": total}
                place.start(run, "trunk", place.training(_training(flags, of_trunk, run.seed, begin) | more))
            link_step(of_trunk, folder, begin)
    place.start(run, "train", place.training(_training(flags, folder, run.seed, arm.steps)))


def _training(flags: Flags, folder: Path, seed: int, steps: int) -> dict[str, Any]:
    """Settings of one start, which ends with a validation: TorchTitan validates at multiples of a number of steps."""
    wanted = parse_config(as_words(flags)).validation.freq
    freq = next(freq for freq in range(min(wanted, steps), steps + 1) if steps % freq == 0)
    own = {
        "job.dump_folder": folder,
        "debug.seed": seed,
        "training.steps": steps,
        "checkpoint.last_save_model_only": False,
        "validation.freq": freq,
    }
    return {**flags, **own}


def is_trained(folder: Path, steps: int) -> bool:
    """Whether a run has a whole checkpoint of that step."""
    return steps in complete_steps(folder / "checkpoint")


def link_step(source: Path, target: Path, step: int) -> None:
    """Begin a run with another's checkpoint; its files are hard links where the file system has them.

    Raises:
        StepFailed: it has none of that step.
    """

    def link(a: str, b: str) -> None:
        try:
            os.link(a, b)
        except OSError:
            shutil.copyfile(a, b)

    if not is_trained(source, step):
        raise StepFailed(f"'{source}' has no checkpoint of step {step}; remove that folder, so that it is trained anew")
    aside = target / "checkpoint.unfinished"
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(source / "checkpoint" / f"step-{step}", aside / f"step-{step}", copy_function=link)
    aside.rename(target / "checkpoint")


def score(place: Workplace, run: Run) -> None:
    """Convert a trained run and score it on the study's benchmarks.

    Raises:
        StepFailed: one of these.
    """
    model = place.model(run)
    if not (model / "README.md").is_file():  # what conversion writes last
        checkpoint = place.folder(run) / "run" / "checkpoint" / f"step-{run.arm.steps}"
        command = [
            sys.executable,
            "scripts/convert_dcp_to_hf.py",
            *as_words({"checkpoint": checkpoint, "output_dir": model}),
        ]
        place.start(run, "convert", command)
    for benchmark, flags in place.study.benchmarks.items():
        if not place.result(run, benchmark).is_file():
            own = {"model_name": model, "output_dir": place.results, "codes_dir": place.study.output_dir / "clip_codes"}
            place.start(run, benchmark, place.python(f"eval/{benchmark}.py", **flags, **own))


def judge(place: Workplace) -> None:
    """Judge the continuations of all runs, which have decayed, one after the other: all have the same prompts."""
    if not place.study.generation:
        return
    with locked(place.study.output_dir / ".generations.lock"):
        for run in place.study.runs:
            if place.record(run)["failed"] or place.generation(run).is_file():
                continue
            own = {"model_name": place.model(run), "output_dir": place.generations, "name": run.name}
            try:
                place.start(run, "generation", place.python("eval/generation.py", **place.study.generation, **own))
            except StepFailed as error:
                fail(place, run, error, step="generation")
            else:
                print(f"{run.name}: judged", flush=True)


def fail(place: Workplace, run: Run, error: StepFailed, step: str = "") -> None:
    logs = sorted((place.folder(run) / "logs").glob("*.log"), key=lambda log: log.stat().st_mtime)
    step = step or (logs[-1].stem if logs else "training")
    place.note(run, failed={"step": step, "why": str(error)})
    print(f"{run.name}: {step} failed: {error}", flush=True)
