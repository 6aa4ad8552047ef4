"""Plot the training curves of one run, with its quantizer levels, or compare several runs.

    uv run python scripts/plot_run.py --run outputs/tiny --picture outputs/tiny/run.png

The curves are read from TensorBoard logs. A metric that was not logged (validation, MFU) has no panel.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llama_mimi.common.command_line import run_command
from llama_mimi.common.errors import UserError
from llama_mimi.common.files import write_atomically
from llama_mimi.report.document import pyplot, save_picture

Series = dict[int, float]  # step -> value
TOTAL = "loss_metrics/global_avg_loss"
# Tags and their labels by title. Several runs are compared by the first tag.
PANELS = {
    "Training loss": {TOTAL: "mean"},
    "Validation loss": {"validation_metrics/loss": "mean"},
    # A panel of its own: this loss is far below that of the levels.
    "Loss of </audio>": {"loss_metrics/audio_end": "training", "validation_metrics/audio_end": "validation"},
    "Fraction of time (%)": {"time_metrics/data_loading(%)": "data", "time_metrics/codec(%)": "of which codec"},
    "Useful tokens per second": {"throughput/useful_tokens_per_s": ""},
    "Seconds of audio per second": {"throughput/audio_seconds_per_s": ""},
    "Model FLOPs utilization (%)": {"throughput/mfu(%)": ""},
    "Learning rate": {"lr": ""},
    "Gradient norm": {"grad_norm": ""},
}
BESIDE_TITLE: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1, 1), "frameon": False, "handlelength": 0.8}
LEVELS = {"Training loss": "loss_metrics/level_", "Validation loss": "validation_metrics/level_"}


def plot_runs(run: tyro.conf.UseAppendAction[list[Path]], picture: Path) -> None:
    """Draw one run, or compare several.

    Args:
        run: dump folder of a run; repeat the flag to compare runs
        picture: PNG or PDF to write

    Raises:
        UserError: a run has no log, or the picture cannot be written.
    """
    if not run:
        raise UserError("no run is named; give one or several as --run")
    if picture.suffix not in (".png", ".pdf"):
        raise UserError(f"the picture '{picture}' is not a PNG or PDF file; choose another --picture")
    runs = {str(folder): read_run(folder) for folder in run}
    write_atomically(str(picture.parent), picture.name, save_picture(draw(runs), picture.suffix[1:]))
    drawn = ", ".join(f"{name} (steps {min(series[TOTAL])} to {max(series[TOTAL])})" for name, series in runs.items())
    print(f"{len(runs)} run{'s' * (len(runs) > 1)} drawn to {picture}: {drawn}")


def read_run(folder: Path) -> dict[str, Series]:
    """Return series by tag. Where a resumed run has logged a step twice, the later start counts.

    Raises:
        UserError: the folder does not exist, or no training step is logged there.
    """
    if not folder.is_dir():
        raise UserError(f"'{folder}' is not a folder; name a run's dump folder as --run")
    series: dict[str, Series] = {}
    # Names of files begin with the time in seconds, names of folders with the time in minutes.
    for file in sorted((folder / "tb").rglob("events.out.tfevents.*"), key=lambda file: file.name):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0})  # all values, not a sample
        events.Reload()
        logged = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
        start = min((min(values) for values in logged.values()), default=None)
        if start is not None:
            kept = {tag: {step: v for step, v in values.items() if step < start} for tag, values in series.items()}
            series = {tag: kept.get(tag, {}) | logged.get(tag, {}) for tag in kept | logged}
    series = {tag: values for tag, values in series.items() if values}
    if TOTAL not in series:
        raise UserError(f"'{folder / 'tb'}' has no log with a training step; train with metrics.enable_tensorboard")
    return series


def draw(runs: Mapping[str, Mapping[str, Series]]) -> Any:
    """Return a figure with the panels that have data, in two columns with one axis of steps."""
    drawn = {title: tags for title, tags in PANELS.items() if any(next(iter(tags)) in run for run in runs.values())}
    titles = [*list(drawn)[: len(drawn) % 2], *drawn]  # the first of an odd number of panels spans both columns
    rows = [titles[i : i + 2] for i in range(0, len(titles), 2)]
    figure, axes = pyplot().subplot_mosaic(rows, figsize=(9, 2 * len(rows)), sharex=True, layout="constrained")
    for title, tags in drawn.items():
        axis, (total, label) = axes[title], next(iter(tags.items()))
        if len(runs) == 1:
            curves = curves_of_one(title, next(iter(runs.values())))
        else:
            curves = [(name, run.get(total, {}), f"C{i}") for i, (name, run) in enumerate(runs.items())]
            title += f", {label}" if label else ""
        for name, series, color in curves:
            marker = "." if len(series) <= 12 else None  # a line through one point is invisible
            if series:
                axis.plot(list(series), list(series.values()), color=color, label=name, marker=marker, linewidth=1.1)
        axis.set_title(title, fontsize=9, loc="left")
        axis.set_ylim(bottom=None if label == "mean" else 0)
        axis.ticklabel_format(useOffset=False, style="plain")
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        handles, labels = axis.get_legend_handles_labels()
        if len(runs) > 1 and total == TOTAL:
            figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=8, frameon=False)
        elif len(runs) == 1 and labels:
            axis.legend(ncols=len(labels), fontsize=7, **BESIDE_TITLE)
    figure.supxlabel("step", fontsize=8)
    return figure


def curves_of_one(title: str, run: Mapping[str, Series]) -> list[tuple[str | None, Series, Any]]:
    """Return label, series and colour of the curves of a panel: levels from dark to light, then the totals."""
    prefix = LEVELS.get(title, "none/")
    levels = sorted(int(tag.removeprefix(prefix)) for tag in run if tag.startswith(prefix))
    curves: list[tuple[str | None, Series, Any]] = []
    for i, level in enumerate(levels):
        name = f"level {level}" if i == 0 else str(level) if len(levels) <= 8 or level == levels[-1] else None
        curves.append((name, run[f"{prefix}{level}"], pyplot().get_cmap("viridis")(0.9 * i / len(levels))))
    colors = ("black", "tab:orange")
    return curves + [(name, run.get(tag, {}), colors[i]) for i, (tag, name) in enumerate(PANELS[title].items())]


if __name__ == "__main__":
    run_command(plot_runs, __doc__)
