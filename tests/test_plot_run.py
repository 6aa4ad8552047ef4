"""Training curves: logs of several starts, panels and errors."""

import math

import plot_run
import pytest
from torch.utils.tensorboard import SummaryWriter

from llama_mimi.common.errors import UserError
from llama_mimi.report.curves import read_curves

LOSS = plot_run.TOTAL


def write_log(run, metrics, *, time=1, folder="20261121-1200"):
    """Write the event file of one start of a run; the file's name contains the start time, as in TorchTitan."""
    with SummaryWriter(run / "tb" / folder) as writer:
        for tag, series in metrics.items():
            for step, value in series.items():
                writer.add_scalar(tag, value, step)
    (written,) = [file for file in (run / "tb" / folder).iterdir() if not file.name.endswith(".test")]
    written.rename(written.with_name(f"events.out.tfevents.{time:010}.test"))
    return run


def test_a_later_start_takes_over_where_it_begins(tmp_path):
    """Clocks were set back, so the names of folders do not show which start was first."""
    first = {LOSS: dict.fromkeys(range(1, 11), 1.0), "validation_metrics/loss": {1: 1.0, 5: 1.0, 9: 1.0}}
    write_log(tmp_path, first, time=100, folder="20261025-0259")
    write_log(tmp_path, {LOSS: {6: 2.0, 7: 2.0}}, time=200, folder="20261025-0201")
    write_log(tmp_path, {}, time=300)  # this start ended before its first value
    read = read_curves(tmp_path)
    assert read[LOSS] == {1: 1, 2: 1, 3: 1, 4: 1, 5: 1, 6: 2, 7: 2}
    assert read["validation_metrics/loss"] == {1: 1, 5: 1}
    steps = range(1, 10_100)  # more than TensorBoard loads by default
    write_log(tmp_path, {LOSS: {step: step / 4 for step in steps}}, time=400)  # starts again at step 1
    assert read_curves(tmp_path) == {LOSS: {step: step / 4 for step in steps}}


def test_one_run_is_drawn_with_its_levels(tmp_path, capsys):
    levels = {f"loss_metrics/level_{level}": {1: level, 2: level} for level in range(11)}
    logged = {LOSS: {1: 5, 2: math.nan}, **levels, "lr": {1: 1, 2: 1}, "time_metrics/data_loading(%)": {1: 2}}
    run, picture = write_log(tmp_path / "run", logged), tmp_path / "new" / "run.png"
    plot_run.plot_runs([run], picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == f"drawn to {picture}: {run} (steps 1 to 2)\n"
    axes = {axis.get_title(loc="left"): axis for axis in plot_run.draw({"": read_curves(run)}).axes}
    assert list(axes) == ["Training loss", "Fraction of time (%)", "Learning rate"]  # other metrics were not logged
    values = [list(line.get_ydata()) for line in axes["Training loss"].get_lines()]
    assert values[:-1] == [[level, level] for level in range(11)]
    assert axes["Training loss"].get_legend_handles_labels()[1] == ["level 0", "level 10", "mean"]
    assert [line.get_label() for line in axes["Fraction of time (%)"].get_lines()] == ["data"]


def test_several_runs_are_compared_by_their_totals():
    level = {"loss_metrics/level_0": {1: 3.0}}
    a = {LOSS: {1: 1.0}, "throughput/mfu(%)": {1: 40.0}, **level}
    b = {LOSS: {2: 2.0, 4: 1.5}, "throughput/mfu(%)": {2: 50.0}, "lr": {2: 1.0}, **level}
    figure = plot_run.draw({"a": a, "b": b})
    lines = {axis.get_title(loc="left"): axis.get_lines() for axis in figure.axes}
    assert {title: [(line.get_label(), line.get_color()) for line in of] for title, of in lines.items()} == {
        "Training loss, mean": [("a", "C0"), ("b", "C1")],
        "Model FLOPs utilization (%)": [("a", "C0"), ("b", "C1")],
        "Learning rate": [("b", "C1")],
    }
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["a", "b"]


def test_mistakes_get_one_sentence(tmp_path):
    no_step = write_log(tmp_path / "no_step", {"validation_metrics/loss": {1: 1.0}})
    run = write_log(tmp_path / "run", {LOSS: {1: 1.0}})
    for folder, picture, message in (
        (no_step, "a.png", "does not contain the log of a training step"),
        (run, "a.odd", "a.odd'; set --picture to a PNG or PDF file"),
    ):
        with pytest.raises(UserError, match=message):
            plot_run.plot_runs([folder], tmp_path / picture)
