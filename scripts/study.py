"""Train, score and judge the runs of a study, and write one report.

    uv run python scripts/study.py config/studies/tiny.toml

To continue a stopped or killed study, run the command again. A failed run does not stop the other runs. The report
names the failed runs, and the next start of the study repeats the failed runs.
"""

import logging
import shlex
from pathlib import Path
from typing import Annotated, Any

import tyro

from llama_mimi.common.command_line import run_command
from llama_mimi.common.errors import UserError


def main(
    file: Annotated[Path, tyro.conf.Positional],
    plan: bool = False,
    slurm: bool = False,
    part: int | None = None,
    report_only: bool = False,
    power: bool = False,
    tflops: float = 0.4 * 989,
) -> None:
    """Run a study.

    Args:
        file: TOML file of the study
        plan: print the FLOPs, hours of audio and GPU hours of each variant, and exit
        slurm: print two sbatch commands that run the study as a SLURM job array, and exit
        part: index of a run, from 0; train and score only this run (for a SLURM job array)
        report_only: write the report of the finished runs, and exit
        power: print the smallest differences that a study with more seeds or items can detect, and exit
        tflops: assumed speed of a GPU for --plan, in TFLOP/s; default: 40 % of an H100's peak in bfloat16
    """
    from llama_mimi.common.cpu import use_cpu_without_gpu

    use_cpu_without_gpu()  # before anything imports TorchTitan
    from llama_mimi.report.document import import_extra
    from llama_mimi.study.config import read_study
    from llama_mimi.study.report import power_report, write_report
    from llama_mimi.study.run import check_unchanged, judge, read_record, train_and_score, write_index

    logging.getLogger().setLevel(logging.ERROR)  # no warnings of TorchTitan about missing base models
    study = read_study(file)
    runs = study.runs
    if part not in (None, *range(len(runs))):
        raise UserError(f"--part is {part}; set it to a number from 0 to {len(runs) - 1}")
    if not tflops > 0:
        raise UserError(f"--tflops is {tflops:g}; set a positive number")
    if plan:
        return print_plan(study, flops_per_hour=tflops * 1e12 * 3600)
    if slurm:  # one job per run, then a job that judges and writes the report
        job = shlex.join([*study.launch.slurm, "scripts/study.slurm", str(file)])
        print(f"job=$(sbatch --parsable --array=0-{len(runs) - 1} {job})")
        return print(f"sbatch --dependency=afterany:$job {job}")
    if power:
        return print(power_report(study), end="")
    import_extra("matplotlib", "the report")  # before runs that take hours
    if not report_only:
        check_unchanged(study)
        train_and_score(study, runs if part is None else [runs[part]])
        if part is None:
            judge(study)
        elif failed := read_record(study, runs[part])["failed"]:
            raise UserError(f"{failed['step']} failed: {failed['why']}; fix this error and re-run the command")
        else:
            return
    lines = write_index(study)
    print(f"written to {write_report(study, lines)}")
    missing = [line["run"] for line in lines if line["state"] != "done"]
    if missing:
        problem = f"these runs are not done: {', '.join(missing)}"
        raise UserError(f"{problem}; fix the causes that the report names, and re-run the command")


def print_plan(study: Any, flops_per_hour: float) -> None:
    """Print the cost of each variant, and the total GPU hours of all runs."""
    from llama_mimi.study.budget import CONTEXT_SECONDS, cost

    generation = f"GFLOP per second of new audio, after {CONTEXT_SECONDS:g} s"
    print(f"| variant | weights (M) | FLOPs per step | steps | FLOPs | hours of audio | GPU hours | {generation} |")
    print("|---|---|---|---|---|---|---|---|")
    gpu_hours = 0.0
    for variant in study.variants:
        one = cost(study.flags(variant), study.launch.nproc_per_node)
        flops, audio_hours = variant.steps * one.step_flops, variant.steps * one.step_seconds / 3600
        gpu_hours += len(study.seeds) * flops / flops_per_hour
        print(
            f"| {variant.name} | {one.num_weights / 1e6:,.1f} | {one.step_flops:.3g} | {variant.steps:,} | {flops:.3g} "
            f"| {audio_hours:,.0f} | {flops / flops_per_hour:,.2f} | {one.generation_flops / 1e9:,.3g} |"
        )
    print(f"\n{len(study.runs)} runs: {gpu_hours:,.1f} GPU hours of training")


if __name__ == "__main__":
    run_command(main, __doc__)
