"""Where the parts of a study lie, which commands make them, how these are started, and what is known of them."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from llama_mimi.common.command_line import as_words
from llama_mimi.common.errors import UserError
from llama_mimi.common.files import read_json, write_atomically
from llama_mimi.common.ranks import end_with_parent
from llama_mimi.study.budget import decay_begins, resolved
from llama_mimi.study.design import Flags, Run, Study

RECORD = "record.json"
LAST_LINES = 5  # of a log, that say why a step failed
TRAIN, CONVERT, GENERATION = "train", "convert", "generation"
# In which starts of one trunk differ.
LENGTHS = ("training.steps", "lr_scheduler.total_steps", "validation.freq")


class StepFailed(Exception):
    """A step of a run failed; the message says why.

    Args:
        step: which.
    """

    def __init__(self, step: str, why: str) -> None:
        super().__init__(why)
        self.step = step


class Stopped(Exception):
    """Nothing more is begun, as something else has ended the study."""


class Workplace:
    """Where the parts of a study lie, and how its commands are started.

    Args:
        study: as its file says it.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        self.results = study.output_dir / "results"
        self.generations = study.output_dir / "generations"
        self.is_stopping = threading.Event()

    def folder(self, run: Run) -> Path:
        """Of a run's training, logs and record."""
        return self.study.output_dir / "runs" / run.name

    def model(self, run: Run) -> Path:
        return self.study.output_dir / "models" / run.name

    def result(self, run: Run, benchmark: str) -> Path:
        return self.results / benchmark / run.name / f"{self.study.scorings[benchmark]}.json"

    def generation(self, run: Run) -> Path:
        return self.generations / f"{run.name}.json"

    def flags(self, run: Run) -> dict[str, Flags]:
        """Of each step of a run."""
        study, model = self.study, self.model(run)
        checkpoint = self.folder(run) / "run" / "checkpoint" / f"step-{run.arm.steps}"
        steps = {
            TRAIN: training_flags(study, run, self.folder(run) / "run", run.arm.steps),
            CONVERT: {"checkpoint": checkpoint, "output_dir": model},
        }
        of_results = {"model_name": model, "output_dir": self.results, "codes_dir": study.output_dir / "clip_codes"}
        steps |= {benchmark: {**flags, **of_results} for benchmark, flags in study.benchmarks.items()}
        if study.generation:
            own = {"model_name": model, "output_dir": self.generations, "name": run.name}
            steps[GENERATION] = {**study.generation, **own}
        return steps

    def record(self, run: Run) -> dict[str, Any]:
        """What is known of a run.

        ``flags`` of the steps that were begun, the ``config_sha256`` of the file that they name, ``seconds`` of steps
        that were finished (of starts that ended by themselves), and where it ``failed``, if it did.
        """
        return {"flags": {}, "config_sha256": None, "seconds": {}, "failed": None} | (
            read_json(str(self.folder(run)), RECORD) or {}
        )

    def note(self, run: Run, **values: Any) -> None:
        record = self.record(run) | values
        write_atomically(str(self.folder(run)), RECORD, (json.dumps(record, indent=1) + "\n").encode())

    def is_done(self, run: Run, step: str, makes: Path) -> bool:
        """Whether a step was done to its end, and what it made is still there."""
        return step in self.record(run)["seconds"] and makes.exists()

    def do(self, run: Run, step: str, command: list[str], flags: Flags) -> None:
        """Do a step of a run to its end.

        Raises:
            StepFailed: the command did.
        """
        self.note(run, flags=self.record(run)["flags"] | {step: as_words(flags)})
        began = time.monotonic()
        self.start(step, self.folder(run) / "logs" / f"{step}.log", [*command, *as_words(flags)])
        seconds = self.record(run)["seconds"] | {step: round(time.monotonic() - began, 1)}
        self.note(run, seconds=seconds)

    def on_ranks(self, *, always: bool = False) -> list[str]:
        """What starts a script on the ranks of this machine."""
        nproc = self.study.launch.nproc_per_node
        if nproc == 1 and not always:
            return [sys.executable]
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]

    @property
    def trainer(self) -> list[str]:
        return self.study.launch.train or [*self.on_ranks(always=True), "-m", "llama_mimi.train"]

    def start(self, step: str, log: Path, command: list[str]) -> None:
        """Start a command and wait for it; it ends with this process, also if that is killed.

        Raises:
            StepFailed: it did.
        """
        launch = self.study.launch
        # Judging is of one run after the other, which has the threads of all that else run at the same time.
        threads = launch.threads and launch.threads * (launch.parallel if step == GENERATION else 1)
        env = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
        if self.is_stopping.is_set():
            raise Stopped
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as output:
            done = subprocess.run(command, stdout=output, stderr=output, env=env, preexec_fn=end_with_parent)
        if done.returncode:
            if self.is_stopping.is_set():
                raise Stopped  # by what ended the command, too
            said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            errors = [line.strip() for line in said if line.strip().startswith("error: ")] or said[-LAST_LINES:]
            raise StepFailed(step, " / ".join(errors)[-600:] or f"it ended with {done.returncode}")


def training_flags(study: Study, run: Run, folder: Path, steps: int) -> Flags:
    """Settings of one start, which ends with a validation: TorchTitan validates at multiples of a number of steps."""
    flags = study.flags(run.arm)
    wanted = resolved(flags).validation.freq
    return {
        **flags,
        "job.dump_folder": folder,
        "debug.seed": run.seed,
        "training.steps": steps,
        "checkpoint.last_save_model_only": False,
        "validation.freq": next(freq for freq in range(min(wanted, steps), steps + 1) if steps % freq == 0),
    }


def config_sha256(study: Study, run: Run) -> str:
    """Of the file that a run's flags name."""
    return hashlib.sha256(Path(study.config[run.arm.architecture]).read_bytes()).hexdigest()


def trunk_step(begin: int) -> str:
    """What training the trunk up to there is called."""
    return f"trunk-{begin}"


def trunk_flags(study: Study, trunk: Run, folder: Path, begin: int, total: int) -> Flags:
    """Of the trunk up to where the decay of a run of so many steps begins, at the constant rate."""
    return training_flags(study, trunk, folder, begin) | {"lr_scheduler.total_steps": total}


def check_unchanged(place: Workplace) -> None:
    """Refuse to go on with what was begun in another way.

    Raises:
        UserError: which run, and how it was.
    """
    for run in place.study.runs:
        _check(place, run, place.flags(run))
    for trunk, seed, arms in place.study.families:
        shared, folder = Run(trunk, seed), place.folder(Run(trunk, seed)) / "run"
        begins = {decay_begins(place.study.flags(arm), arm.steps): arm.steps for arm in arms}
        steps = {trunk_step(n): trunk_flags(place.study, shared, folder, n, total) for n, total in begins.items() if n}
        # A trunk may have gone as far as arms needed that are no more in the study.
        any_length = next(iter(steps.values()), None)
        begun = dict.fromkeys(place.record(shared)["flags"], any_length) if any_length else {}
        _check(place, shared, begun | steps, LENGTHS)


def _check(place: Workplace, run: Run, steps: dict[str, Flags], ignored: Collection[str] = ()) -> None:
    record, file = place.record(run), place.study.config[run.arm.architecture]
    for step, flags in steps.items():
        if step not in record["flags"]:
            continue
        old, new = by_flag(record["flags"][step]), by_flag(as_words(flags))
        changed = [flag for flag in old | new if old.get(flag) != new.get(flag) and flag.strip("-") not in ignored]
        if changed:
            flag = changed[0]
            raise UserError(
                f"the step '{step}' of {run.name} was begun with {flag} {old.get(flag, 'not set')}, where "
                f"'{place.study.path}' has {flag} {new.get(flag, 'not set')} now; restore that, or choose another "
                "output_dir"
            )
    if record["config_sha256"] not in (None, config_sha256(place.study, run)):
        raise UserError(f"'{file}' was edited since {run.name} was begun; restore it, or choose another output_dir")


def by_flag(words: Sequence[str]) -> dict[str, str]:
    """Values by flag of a command line."""
    values: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            flag = values.setdefault(word, [])
        else:
            flag.append(word)
    return {flag: " ".join(some) or "on" for flag, some in values.items()}
