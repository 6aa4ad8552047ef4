"""Plot the training curves of one run with the loss of each quantizer level, or compare several runs.

    uv run python scripts/plot_run.py --run outputs/tiny --picture outputs/tiny/run.png

The curves are read from TensorBoard logs. Metrics that were not logged, such as validation or MFU, are left out.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tyro

from llama_mimi.common.command_line import run_command
from llama_mimi.common.errors import UserError
from llama_mimi.common.files import write_atomically
from llama_mimi.report.curves import Series, read_curves
from llama_mimi.report.document import pyplot, save_picture

TOTAL = "loss_metrics/global_avg_loss"
# Tags and labels of each panel. A panel that compares several runs shows only its first tag.
PANELS = {
    "Training loss": {TOTAL: "mean"},
    "Validation loss": {"validation_metrics/loss": "mean"},
    # In a separate panel, because this loss is far below the losses of the levels.
    "Loss of </audio>": {"loss_metrics/audio_end": "training", "validation_metrics/audio_end": "validation"},
    "Fraction of time (%)": {"time_metrics/data_loading(%)": "data", "time_metrics/codec(%)": "of which codec"},
    "Useful tokens per second": {"throughput/useful_tokens_per_s": ""},
    "Seconds of audio per second": {"throughput/audio_seconds_per_s": ""},
    "Model FLOPs utilization (%)": {"throughput/mfu(%)": ""},
    "Learning rate": {"lr": ""},
    "Gradient norm": {"grad_norm": ""},
}


def plot_runs(run: tyro.conf.UseAppendAction[list[Path]], picture: Path) -> None:
    """Plot one run, or compare several runs.

    Args:
        run: dump folder of a run; repeat the flag to compare runs
        picture: PNG or PDF file to write
    """
    if picture.suffix not in (".png", ".pdf"):
        raise UserError(f"--picture is '{picture}'; set --picture to a PNG or PDF file")
    if not run:
        raise UserError("--run is missing; set --run to the dump folder of a run")
    runs = {str(folder): read_curves(folder) for folder in run}
    if missing := [name for name, curves in runs.items() if TOTAL not in curves]:
        problem = f"'{missing[0]}/tb' does not contain the log of a training step"
        raise UserError(f"{problem}; set --run to the dump folder of a run")
    write_atomically(str(picture.parent), picture.name, save_picture(draw(runs), picture.suffix[1:]))
    drawn = ", ".join(f"{name} (steps {min(curves[TOTAL])} to {max(curves[TOTAL])})" for name, curves in runs.items())
    print(f"drawn to {picture}: {drawn}")


def draw(runs: Mapping[str, Mapping[str, Series]]) -> Any:
    """Return a figure with one panel for each logged metric. All panels share one x axis: the training step."""
    drawn = [title for title, tags in PANELS.items() if any(next(iter(tags)) in run for run in runs.values())]
    titles = [*drawn[: len(drawn) % 2], *drawn]  # if the number of panels is odd, the first panel spans both columns
    rows = [titles[i : i + 2] for i in range(0, len(titles), 2)]
    figure, axes = pyplot().subplot_mosaic(rows, figsize=(9, 2 * len(rows)), sharex=True, layout="constrained")
    for title in drawn:
        axis, (total, label) = axes[title], next(iter(PANELS[title].items()))
        curves: list[tuple[str | None, Series, Any]]
        if len(runs) > 1:
            curves = [(name, run.get(total, {}), f"C{i}") for i, (name, run) in enumerate(runs.items())]
            title += f", {label}" if label else ""
        else:
            (run,) = runs.values()
            curves = levels_of(run, total) if label == "mean" else []
            named = zip(PANELS[title].items(), ("black", "tab:orange"), strict=False)
            curves += [(name, run.get(tag, {}), color) for (tag, name), color in named]
        for name, series, color in curves:
            if series:
                axis.plot(list(series), list(series.values()), ".-", color=color, label=name, markersize=3, linewidth=1)
        axis.set_title(title, fontsize=9, loc="left")
        axis.set_ylim(bottom=None if label == "mean" else 0)
        axis.ticklabel_format(useOffset=False, style="plain")
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[1] and (len(runs) == 1 or total == TOTAL):
            axis.legend(ncols=2, fontsize=7, frameon=False)
    figure.supxlabel("step", fontsize=8)
    return figure


def levels_of(run: Mapping[str, Series], total: str) -> list[tuple[str | None, Series, Any]]:
    """Return the label, series and colour of each level of a loss. Only the first and the last level have a label."""
    prefix = f"{total.split('/')[0]}/level_"
    levels = sorted(int(tag.removeprefix(prefix)) for tag in run if tag.startswith(prefix))
    names = [f"level {level}" if level in (levels[0], levels[-1]) else None for level in levels]
    colors = pyplot().get_cmap("viridis")
    return [(names[i], run[f"{prefix}{level}"], colors(0.9 * i / len(levels))) for i, level in enumerate(levels)]


if __name__ == "__main__":
    run_command(plot_runs, __doc__)
