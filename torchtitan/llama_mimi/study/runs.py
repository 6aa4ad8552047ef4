"""The way of each run: training, conversion, scores, continuations judged.

Every step is a command that a user could start, with its output in a log beside. What is finished is kept, so that a
study that was killed goes on; a step that fails makes its run a hole with a name, and the others go on.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

from llama_mimi.checkpoint.dcp import complete_steps
from llama_mimi.common.errors import UserError
from llama_mimi.common.files import LOCK, locked
from llama_mimi.study.budget import decay_begins
from llama_mimi.study.design import Arm, Run
from llama_mimi.study.workplace import (
    CONVERT,
    GENERATION,
    TRAIN,
    StepFailed,
    Stopped,
    Workplace,
    config_sha256,
    trunk_flags,
    trunk_step,
)


def make_ready(place: Workplace) -> None:
    """Do what must be there before the first run, once, whoever comes first.

    Raises:
        UserError: a command failed.
    """
    folder = place.study.output_dir / "before"
    with locked(folder / LOCK, "output_dir", wait=True):
        for number, before in enumerate(place.study.before):
            done, said = folder / f"{number}.done", " ".join(before.command)
            if Path(before.makes).exists() and done.is_file() and done.read_text() == said:
                continue
            print(f"before the runs: {said}", flush=True)
            try:
                place.start("before", folder / f"{number}.log", [sys.executable, *before.command])
            except StepFailed as error:
                raise UserError(f"`{said}` failed (see '{folder / f'{number}.log'}'): {error}") from error
            if not Path(before.makes).exists():
                raise UserError(f"`{said}` did not make '{before.makes}'; mend [[before]] of the study")
            done.write_text(said)


def run_families(place: Workplace, numbers: list[int]) -> None:
    """Train, convert and score families of runs, several at a time, and print what becomes of them."""
    families = place.study.families

    def run_one(number: int) -> None:
        if place.is_stopping.is_set():
            return
        try:
            run_family(place, *families[number])
        except Stopped:
            pass
        except BaseException:
            place.is_stopping.set()
            raise

    with ThreadPoolExecutor(place.study.launch.parallel) as pool:
        jobs = [pool.submit(run_one, number) for number in numbers]
        try:
            for job in as_completed(jobs):
                job.result()
        except BaseException:  # such as an interrupt: what is begun ends, and nothing more begins
            place.is_stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def run_family(place: Workplace, trunk: Arm, seed: int, arms: list[Arm]) -> None:
    """Runs that differ in their steps alone: up to where its decay begins, each is the trunk of all of them."""
    with locked(place.study.output_dir / "runs" / f".{Run(trunk, seed).name}{LOCK}", "output_dir", wait=True):
        for arm in arms:
            run = Run(arm, seed)
            with noting_failure(place, run, "preparation"):
                train(place, run, trunk, arms)
                score(place, run)
                print(f"{run.name}: trained and scored", flush=True)


@contextmanager
def noting_failure(place: Workplace, run: Run, step: str) -> Iterator[None]:
    """A failure makes the run a hole with a name, and does not go further.

    Args:
        step: of a failure that is none of a command.
    """
    try:
        yield
    except (StepFailed, OSError, UserError) as error:
        step = error.step if isinstance(error, StepFailed) else step
        place.note(run, failed={"step": step, "why": str(error)})
        print(f"{run.name}: {step} failed: {error}", flush=True)
    else:
        place.note(run, failed=None)


def train(place: Workplace, run: Run, trunk: Arm, arms: list[Arm]) -> None:
    """Train a run to its end, from the trunk's checkpoint where its decay begins if it is one of several.

    The schedule of TorchTitan depends on the step and the total alone, so that this is what a run of its own from the
    beginning would be.

    Raises:
        StepFailed: the trunk's training, or this.
    """
    arm, folder = run.arm, place.folder(run) / "run"
    last = folder / "checkpoint" / f"step-{arm.steps}"
    if place.is_done(run, TRAIN, last):
        return
    place.note(run, config_sha256=config_sha256(place.study, run))
    begin = decay_begins(place.study.flags(arm), arm.steps) if len(arms) > 1 else 0
    if begin and not (folder / "checkpoint").exists():
        shared = Run(trunk, run.seed)
        of_trunk = place.folder(shared) / "run"
        if begin not in complete_steps(of_trunk / "checkpoint"):
            place.note(shared, config_sha256=config_sha256(place.study, shared))
            flags = trunk_flags(place.study, shared, of_trunk, begin, arm.steps)
            place.do(shared, trunk_step(begin), place.trainer, flags)
        link_step(of_trunk, folder, begin)
    # Killed behind its last checkpoint it would be thought to be done, and its validation would be missing.
    shutil.rmtree(last, ignore_errors=True)
    place.do(run, TRAIN, place.trainer, place.flags(run)[TRAIN])


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

    if step not in complete_steps(source / "checkpoint"):
        why = f"'{source}' has no checkpoint of step {step}; remove that folder, so that it is trained anew"
        raise StepFailed(trunk_step(step), why)
    aside = target / "checkpoint.unfinished"
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(source / "checkpoint" / f"step-{step}", aside / f"step-{step}", copy_function=link)
    aside.rename(target / "checkpoint")


def score(place: Workplace, run: Run) -> None:
    """Convert a trained run and score it on the study's benchmarks.

    Raises:
        StepFailed: one of these.
    """
    flags = place.flags(run)
    if not place.is_done(run, CONVERT, place.model(run) / "config.json"):
        place.do(run, CONVERT, [sys.executable, "scripts/convert_dcp_to_hf.py"], flags[CONVERT])
    for benchmark in place.study.benchmarks:
        if not place.is_done(run, benchmark, place.result(run, benchmark)):
            place.do(run, benchmark, [*place.on_ranks(), f"eval/{benchmark}.py"], flags[benchmark])


def judge(place: Workplace) -> None:
    """Judge the continuations of all runs, which have decayed, one after the other: all have the same prompts."""
    if not place.study.generation:
        return
    with locked(place.study.output_dir / f".generations{LOCK}", "output_dir", wait=True):
        for run in place.study.runs:
            failed = place.record(run)["failed"]
            is_scored = CONVERT in place.record(run)["seconds"] and (failed is None or failed["step"] == GENERATION)
            if not is_scored or place.is_done(run, GENERATION, place.generation(run)):
                continue
            with noting_failure(place, run, GENERATION):
                command = [*place.on_ranks(), "eval/generation.py"]
                place.do(run, GENERATION, command, place.flags(run)[GENERATION])
                print(f"{run.name}: judged", flush=True)
