"""Loss curves of 300 tiny steps in one picture: chunks against full logits, packed against separate, units alone.

    uv run python scripts/loss_curves.py --output_dir outputs/curves --picture assets/loss_curves.png

Four runs of the tiny model in one process each, on codes of `assets/tiny`; a packed step has as many units as one of
separate rows, as nearly as whole rows allow. Validation is the same for all: one clip a row, units and ``</audio>``.
Full logits are made here only.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from pictures import save
from plot_run import read_run
from training_ways import ONE_RANK

from llama_mimi.cross_entropy import PendingLogits
from llama_mimi.errors import UserError, run_cli

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LOSS, VALIDATION = "loss_metrics/global_avg_loss", "validation_metrics/loss"
LOG_FREQ = 5
BASE, FULL, PACKED, AUDIO = "separate rows, in chunks, Llama vocabulary", "full logits", "packed rows", "units alone"
RUNS = {
    BASE: ["--training.local_batch_size", "6"],
    FULL: ["--training.local_batch_size", "6"],
    PACKED: ["--training.local_batch_size", "4", "--data.packing", "pack"],
    AUDIO: ["--training.local_batch_size", "6", "--model.vocabulary", "audio"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="codes and runs; finished ones are not run again"
    )
    parser.add_argument("--picture", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # JSON: name and arguments of one run, in its own process
    flags = parser.parse_args()
    if flags.worker:
        train(*json.loads(flags.worker))
        return
    for split in ("train", "validation"):
        tokenize(split, flags.output_dir / "codes" / split)
    runs = {}
    for number, name in enumerate(RUNS):
        folder = flags.output_dir / f"run-{number}"
        if not (folder / "checkpoint" / f"step-{flags.steps}" / ".metadata").is_file():
            start(name, folder, flags)
        runs[name] = read_run(folder)
    draw(runs, flags.picture)
    for name, run in runs.items():
        units, last = units_seen(run), flags.steps
        print(
            f"{name}: {max(units.values()):,.0f} units; loss {run[LOSS][last]:.4f}, validation "
            f"{run[VALIDATION][last]:.4f} at step {last}"
        )
    difference = max(abs(loss - runs[FULL][LOSS][step]) for step, loss in runs[BASE][LOSS].items())
    print(f"chunks and full logits differ by {difference:.1e} at most; {flags.picture}")


def tokenize(split: str, folder: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("tokenize_corpus.py")), "--codec", "assets/tiny/mimi"]
    corpus = ["--corpus", f"assets/tiny/corpus/{split}-*.parquet", "--output_dir", str(folder)]
    if subprocess.run([*command, *corpus]).returncode:
        raise UserError(f"'{split}' of assets/tiny could not be tokenised; see above")


def start(name: str, folder: Path, flags: argparse.Namespace) -> None:
    arguments = {
        "--job.config_file": "config/tiny.toml",
        "--job.dump_folder": folder,
        "--training.dataset": flags.output_dir / "codes" / "train",
        "--validation.dataset": flags.output_dir / "codes" / "validation",
        "--validation.freq": flags.steps // 10,
        "--training.steps": flags.steps,
        "--checkpoint.interval": flags.steps,
        "--metrics.log_freq": LOG_FREQ,
    }
    words = [str(word) for item in arguments.items() for word in item]
    job = json.dumps([name, [*words, *RUNS[name]]])
    command = [sys.executable, __file__, "--output_dir", flags.output_dir, "--picture", flags.picture, "--worker", job]
    if subprocess.run(command, env=os.environ | ONE_RANK).returncode:
        raise UserError(f"the run '{name}' failed; see above")


def train(name: str, arguments: list[str]) -> None:
    from llama_mimi import losses
    from llama_mimi import train as trainer

    if name == FULL:
        losses.cross_entropy = full_cross_entropy
    sys.argv[1:] = arguments
    trainer.main()


def full_cross_entropy(
    logits: PendingLogits, positions_N: torch.Tensor, targets_N: torch.Tensor, chunk_step: Callable | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`llama_mimi.cross_entropy.cross_entropy` with all logits at once."""
    logits_NV = logits.compute().float().flatten(0, 1)[positions_N]
    losses_N = F.cross_entropy(logits_NV, targets_N, reduction="none")
    return losses_N.sum(), losses_N.detach()


def units_seen(run: dict[str, dict[int, float]]) -> dict[int, float]:
    """Targets that went into the loss up to each logged step."""
    seen, total, before = {}, 0.0, 0
    for step, seconds in sorted(run["time_metrics/end_to_end(s)"].items()):
        total += run["throughput/useful_tokens_per_s"][step] * seconds * (step - before)
        seen[step], before = total, step
    return seen


def draw(runs: dict[str, dict[str, dict[int, float]]], path: Path) -> None:
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.8), sharey=True, layout="constrained")
    for panel, other in zip(panels, (FULL, PACKED, AUDIO), strict=True):
        for name, color, style in ((BASE, "tab:blue", "-"), (other, "tab:orange", "--")):
            run, units = runs[name], units_seen(runs[name])
            panel.plot(
                [units[s] / 1e3 for s in run[LOSS]], list(run[LOSS].values()), color=color, ls=style, lw=1, alpha=0.6
            )
            steps = [step for step in run[VALIDATION] if step in units]
            panel.plot(
                [units[s] / 1e3 for s in steps],
                [run[VALIDATION][s] for s in steps],
                color=color,
                ls=style,
                marker="o",
                ms=4,
                label=name,
            )
        panel.set(title=f"{other}", xlabel="units trained on (thousands)")
        panel.legend(fontsize=8, title="validation (thin: training)", title_fontsize=8)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("loss (nats a unit)")
    save(figure, path, dpi=120)


if __name__ == "__main__":
    run_cli(main)
