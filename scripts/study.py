"""A study from one file: trains a grid of runs, scores and judges them, and writes one report.

    uv run python scripts/study.py config/studies/tiny.toml

What is finished is kept: a study that was stopped or killed goes on when it is started again. A run that fails is named
in the report, is tried again at the next start, and does not stop the others.
"""

import logging
import shlex
from pathlib import Path
from typing import Annotated

import tyro

from llama_mimi.common.cpu import use_cpu_without_gpu

use_cpu_without_gpu()  # before anything imports TorchTitan

from study_report import write_report  # noqa: E402
from torchtitan.tools.logging import logger  # noqa: E402

from llama_mimi.common.command_line import run_command  # noqa: E402
from llama_mimi.common.errors import UserError  # noqa: E402
from llama_mimi.study.budget import cost_of_step, decay_begins  # noqa: E402
from llama_mimi.study.design import Run, Study, read_study  # noqa: E402
from llama_mimi.study.registry import write_index  # noqa: E402
from llama_mimi.study.runs import judge, make_ready, run_families  # noqa: E402
from llama_mimi.study.workplace import Workplace, check_unchanged  # noqa: E402

FRAMES_PER_HOUR = 12.5 * 3600  # of Mimi


def study(
    file: Annotated[Path, tyro.conf.Positional],
    plan: bool = False,
    slurm: bool = False,
    part: int | None = None,
    report_only: bool = False,
    gpu_tflops: float = 989.0,
    mfu: float = 0.4,
) -> None:
    """Run a study.

    Args:
        file: TOML file of the study
        plan: print the runs, their FLOPs and GPU hours, and do nothing
        slurm: print the two sbatch commands that run it as an array of jobs, and do nothing
        part: train and score only this job of the array
        report_only: write the report of what is there
        gpu_tflops: of a GPU, for the plan; that of an H100 in bfloat16 by NVIDIA's data sheet
        mfu: share of that which training reaches, for the plan

    Raises:
        UserError: the file cannot be used, a command before the runs failed, or a run is not done in the end.
    """
    logger.setLevel(logging.ERROR)  # that a base model is not here yet is no news
    chosen = read_study(file)
    for flag, value in {"gpu_tflops": gpu_tflops, "mfu": mfu}.items():
        if value <= 0:
            raise UserError(f"--{flag} is {value}; it must be a positive number")
    if plan:
        return print_plan(chosen, gpu_tflops * 1e12 * mfu)
    if slurm:
        return print_slurm(chosen)
    place = Workplace(chosen)
    if part is not None and report_only:
        raise UserError("--part trains a part, and --report_only nothing; choose one")
    if part is not None and not 0 <= part < len(chosen.families):
        raise UserError(f"--part is {part}; the study has the jobs 0 to {len(chosen.families) - 1}")
    if not report_only:
        check_unchanged(place)
        make_ready(place)
        run_families(place, list(range(len(chosen.families))) if part is None else [part])
    if part is not None:
        _, seed, arms = chosen.families[part]
        failed = [run.name for arm in arms if place.record(run := Run(arm, seed))["failed"]]
        if failed:
            raise UserError(f"{', '.join(failed)} failed; see the lines above, and start this part again")
        return
    if not report_only:
        judge(place)
    lines = write_index(place)
    print(write_report(place, lines))
    holes = [line["run"] for line in lines if line["state"] != "done"]
    done = f"{len(lines) - len(holes)} of {len(lines)} runs are done"
    if holes:
        raise UserError(
            f"{done}; the report says why these are not, which are tried again at the next start: {', '.join(holes)}"
        )
    print(done)


def print_plan(chosen: Study, flops_per_s: float) -> None:
    """What each arm costs beyond what the arms of its trunk before it have trained, and the whole."""
    print("| arm | FLOPs a step | steps | of which its own | GPU hours of these | hours of audio |")
    print("|---|---|---|---|---|---|")
    total = 0.0
    for _, seed, arms in chosen.families:
        if seed != chosen.seeds[0]:
            break
        trained = 0
        for arm in arms:
            flags = chosen.flags(arm)
            step, begin = cost_of_step(flags, chosen.launch.nproc_per_node), decay_begins(flags, arm.steps)
            steps = arm.steps - (min(trained, begin) if len(arms) > 1 else 0)
            trained = max(trained, begin)
            hours = step.flops * steps / flops_per_s / 3600
            total += hours
            heard = step.frames * arm.steps / FRAMES_PER_HOUR
            print(f"| {arm.name} | {step.flops:.3g} | {arm.steps:,} | {steps:,} | {hours:,.2f} | {heard:,.0f} |")
    print(f"\n{chosen.size}: {len(chosen.seeds) * total:,.1f} GPU hours of training")


def print_slurm(chosen: Study) -> None:
    """An array of one job a family, and a job that judges and writes the report behind it."""
    job = shlex.join([*chosen.launch.slurm, "scripts/study.slurm", str(chosen.path)])
    print(f"job=$(sbatch --parsable --array=0-{len(chosen.families) - 1} {job})")
    print(f"sbatch --dependency=afterany:$job {job}")


if __name__ == "__main__":
    run_command(study, __doc__)
