"""Train, score and judge the runs of a study, and write one report.

    uv run python scripts/study.py config/studies/tiny.toml

A study that was stopped or killed continues when the command is started again. A run that fails does not stop the
others; the report names it, and the next start tries it again.
"""

import logging
import shlex
from pathlib import Path
from typing import Annotated

import tyro

from llama_mimi.common.cpu import use_cpu_without_gpu

use_cpu_without_gpu()  # before anything imports TorchTitan

from llama_mimi.common.command_line import run_command  # noqa: E402
from llama_mimi.common.errors import UserError  # noqa: E402
from llama_mimi.study.budget import step_flops  # noqa: E402
from llama_mimi.study.config import read_study  # noqa: E402
from llama_mimi.study.report import write_report  # noqa: E402
from llama_mimi.study.run import check_unchanged, judge, read_record, train_and_score, write_index  # noqa: E402


def main(
    file: Annotated[Path, tyro.conf.Positional],
    plan: bool = False,
    slurm: bool = False,
    part: int | None = None,
    report_only: bool = False,
    tflops: float = 0.4 * 989,
) -> None:
    """Run a study.

    Args:
        file: TOML file of the study
        plan: print the variants, their FLOPs and GPU hours, and start nothing
        slurm: print the two sbatch commands that run the study as an array of jobs, and start nothing
        part: number of the run that this job of the array trains and scores
        report_only: write the report of the finished runs, and start nothing
        tflops: TFLOP/s that a GPU reaches, for the plan; the default is 40 % of an H100's peak in bfloat16
    """
    logging.getLogger().setLevel(logging.ERROR)  # plans need no base model, and TorchTitan would warn of that
    study = read_study(file)
    runs = study.runs
    if tflops <= 0 or part not in (None, *range(len(runs))):
        raise UserError(f"--tflops is {tflops} and --part {part}; they are positive and 0 to {len(runs) - 1}")
    if plan:
        print("| variant | FLOPs a step | steps | GPU hours |\n|---|---|---|---|")
        flops = {v: step_flops(study.flags(v), study.launch.nproc_per_node) for v in study.variants}
        hours = {v: number * v.steps / (tflops * 1e12 * 3600) for v, number in flops.items()}
        for variant, number in flops.items():
            print(f"| {variant.name} | {number:.3g} | {variant.steps:,} | {hours[variant]:,.2f} |")
        return print(f"\n{len(runs)} runs: {sum(hours.values()) * len(study.seeds):,.1f} GPU hours of training")
    if slurm:  # an array of one job for each run, and a job behind it that judges and writes the report
        job = shlex.join([*study.launch.slurm, "scripts/study.slurm", str(file)])
        print(f"job=$(sbatch --parsable --array=0-{len(runs) - 1} {job})")
        return print(f"sbatch --dependency=afterany:$job {job}")
    if not report_only:
        check_unchanged(study)
        train_and_score(study, runs if part is None else [runs[part]])
        if part is None:
            judge(study)
        elif failed := read_record(study, runs[part])["failed"]:
            raise UserError(f"{failed['step']} failed: {failed['why']}; start --part {part} again")
        else:
            return
    lines = write_index(study)
    print(write_report(study, lines))
    missing = [line["run"] for line in lines if line["state"] != "done"]
    if missing:
        raise UserError(f"not done: {', '.join(missing)}; the report says why, and the next start tries them again")


if __name__ == "__main__":
    run_command(main, __doc__)
