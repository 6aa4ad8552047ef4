"""The course of one run or of several as one picture, from their TensorBoard logs.

    uv run python scripts/plot_run.py --run outputs/tiny --picture outputs/tiny/run.png

One run is drawn level by level. With --run given several times, totals are compared, one colour a run. What was not
logged (validation, the share of a GPU's peak) has no panel.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import tyro
from pictures import save
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llama_mimi.common.command_line import run_command
from llama_mimi.common.errors import UserError

Series = dict[int, float]  # step -> value
Line = tuple[Series, dict[str, Any]]  # and how it is drawn
TOTAL = "loss_metrics/global_avg_loss"


@dataclass(frozen=True)
class Panel:
    """What is drawn on one pair of axes.

    Args:
        tags: label by tag; the first is the total, which is all that is drawn of several runs.
        levels: prefix of the tags of levels, drawn beside the total of one run.
        from_zero: whether the axis begins at 0, as where values are read as shares of each other.
    """

    title: str
    tags: Mapping[str, str]
    levels: str = ""
    from_zero: bool = True

    @property
    def total(self) -> str:
        return next(iter(self.tags))


PANELS = (
    Panel("Training loss", {TOTAL: "mean"}, "loss_metrics/level_", from_zero=False),
    Panel("Validation loss", {"validation_metrics/loss": "mean"}, "validation_metrics/level_", from_zero=False),
    # It falls far below that of the levels, which on one scale with it could not be told apart.
    Panel("Loss of </audio>", {"loss_metrics/audio_end": "training", "validation_metrics/audio_end": "validation"}),
    Panel("Share of time (%)", {"time_metrics/data_loading(%)": "data", "time_metrics/codec(%)": "of which codec"}),
    Panel("Useful tokens per second", {"throughput/useful_tokens_per_s": ""}),
    Panel("Seconds of audio per second", {"throughput/audio_seconds_per_s": ""}),
    Panel("Model FLOPs utilization (%)", {"throughput/mfu(%)": ""}),
    Panel("Learning rate", {"lr": ""}),
    Panel("Gradient norm", {"grad_norm": ""}),
)


def plot_runs(run: tyro.conf.UseAppendAction[list[Path]], picture: Path) -> None:
    """Draw the course of one run or of several.

    Args:
        run: dump folder; repeat it to compare
        picture: PNG or PDF to write

    Raises:
        UserError: nothing is logged there, or the picture cannot be written.
    """
    if not run:
        raise UserError("no run is named; give one or several as --run")
    runs = {str(folder): read_run(folder) for folder in run}
    draw(runs, picture)
    drawn = ", ".join(f"{name} (steps {min(series[TOTAL])} to {max(series[TOTAL])})" for name, series in runs.items())
    print(f"{len(runs)} run{'s' * (len(runs) > 1)} drawn to {picture}: {drawn}")


def read_run(folder: Path) -> dict[str, Series]:
    """Series by tag, from every start of a run.

    A run that was killed and resumed has logged the steps after its last checkpoint twice; the later start counts.

    Raises:
        UserError: no such folder, or no training step is logged there.
    """
    if not folder.is_dir():
        raise UserError(f"'{folder}' is no folder; name a run's dump folder as --run")
    series: dict[str, Series] = {}
    # Names begin with the time of writing. Folders do, too, but only to the minute.
    for file in sorted((folder / "tb").rglob("events.out.tfevents.*"), key=lambda file: file.name):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0})  # all, not a sample
        events.Reload()
        logged = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
        if not logged:
            continue
        first_step = min(min(values) for values in logged.values())
        # What an earlier start did from there on is undone, also where this one has not come yet.
        series = {tag: {step: v for step, v in values.items() if step < first_step} for tag, values in series.items()}
        for tag, values in logged.items():
            series.setdefault(tag, {}).update(values)
    series = {tag: values for tag, values in series.items() if values}
    if TOTAL not in series:
        raise UserError(f"'{folder / 'tb'}' holds no log with a training step; train with metrics.enable_tensorboard")
    return series


def draw(runs: Mapping[str, Mapping[str, Series]], path: Path) -> None:
    """All panels for which something was logged, in two columns, on one scale of steps.

    Raises:
        UserError: the picture cannot be written.
    """
    drawn = [panel for panel in PANELS if any(panel.total in run for run in runs.values())]
    # With an odd number of panels the first, which is looked at most, has a row of its own.
    places = [0] * (len(drawn) % 2) + list(range(len(drawn)))
    rows: list[Any] = [places[i : i + 2] for i in range(0, len(places), 2)]
    figure, axes = plt.subplot_mosaic(rows, figsize=(9, 2 * len(rows)), sharex=True, layout="constrained")
    plain: dict[str, Any] = {"frameon": False, "borderpad": 0}
    for i, panel in enumerate(drawn):
        axis, is_one, label = axes[i], len(runs) == 1, panel.tags[panel.total]
        for series, style in lines_of_one(panel, *runs.values()) if is_one else lines_of_runs(panel, runs):
            marker = "." if len(series) <= 12 else None  # few points are seen as such, and one is seen at all
            axis.plot(list(series), list(series.values()), marker=marker, **{"linewidth": 1.2, **style})
        axis.set_title(panel.title if is_one or not label else f"{panel.title}, {label}", fontsize=9, loc="left")
        axis.set_ylim(bottom=0 if panel.from_zero else None)
        for scale in (axis.xaxis, axis.yaxis):
            scale.set_major_formatter("{x:,.6g}")
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
        handles, labels = axis.get_legend_handles_labels()
        if is_one and labels:  # on the line of the title, where it never lies over data
            spaces = {"handlelength": 0.8, "borderaxespad": 0.3, "columnspacing": 0.6, "handletextpad": 0.3}
            axis.legend(ncols=len(labels), loc="lower right", bbox_to_anchor=(1, 1), fontsize=7, **spaces, **plain)
        elif labels and i == 0:
            figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=8, **plain)
    for i in rows[-1]:
        axes[i].set_xlabel("step", fontsize=8)
    save(figure, path, dpi=150)


def lines_of_one(panel: Panel, run: Mapping[str, Series]) -> Iterator[Line]:
    """Levels from dark to light, and the total in black above them."""
    levels = {tag.removeprefix(panel.levels): tag for tag in run if panel.levels and tag.startswith(panel.levels)}
    for i, level in enumerate(sorted(levels, key=int)):
        shade = plt.get_cmap("viridis")(0.9 * i / len(levels))
        is_named = len(levels) <= 8 or i == len(levels) - 1  # as many as stand beside the title
        label = f"level {level}" if i == 0 else level if is_named else None
        yield run[levels[level]], {"color": shade, "linewidth": 0.8, "label": label}
    for color, (tag, name) in zip(("black", "tab:orange"), panel.tags.items(), strict=False):
        if tag in run:
            yield run[tag], {"color": color, "label": name}


def lines_of_runs(panel: Panel, runs: Mapping[str, Mapping[str, Series]]) -> Iterator[Line]:
    """The total of each run, in the run's colour."""
    for i, (name, run) in enumerate(runs.items()):
        if panel.total in run:
            yield run[panel.total], {"color": plt.get_cmap("tab20" if len(runs) > 10 else "tab10")(i), "label": name}


if __name__ == "__main__":
    run_command(plot_runs, __doc__)
