"""Training curves: logs of several starts, panels, and errors."""

import math

import plot_run
import pytest
from torch.utils.tensorboard import SummaryWriter

from llama_mimi.common.errors import UserError

LOSS = plot_run.TOTAL


def write_log(run, metrics, *, time=1, folder="20261121-1200"):
    """Write the event file of one start of a run, with the time of the start in its name as TorchTitan has it."""
    with SummaryWriter(run / "tb" / folder) as writer:
        for tag, series in metrics.items():
            for step, value in series.items():
                writer.add_scalar(tag, value, step)
    (written,) = [file for file in (run / "tb" / folder).iterdir() if not file.name.endswith(".test")]
    written.rename(written.with_name(f"events.out.tfevents.{time:010}.test"))
    return run


@pytest.fixture
def draw(monkeypatch, capsys):
    """Run the script; return the figure and the printed text."""

    def run(picture, *runs):
        figures = []
        monkeypatch.setattr("matplotlib.pyplot.close", figures.append)
        plot_run.plot_runs([*runs], picture)
        (figure,) = figures
        return figure, capsys.readouterr().out

    return run


def test_series_are_what_was_logged(tmp_path):
    steps = range(1, 10_100)  # more than TensorBoard keeps unless it is told to
    written = {LOSS: {step: 7 / step for step in steps}, "lr": {1: 0.5, 10: 0.25}}
    read = plot_run.read_run(write_log(tmp_path, written))
    assert read.keys() == written.keys()
    assert read["lr"] == written["lr"]
    assert read[LOSS] == pytest.approx(written[LOSS], rel=1e-6)


@pytest.mark.parametrize("folders", [("20261121-1200", "20261121-1200"), ("20261025-0259", "20261025-0201")])
def test_a_later_start_takes_over_where_it_begins(tmp_path, folders):
    """In the same minute, and when clocks were set back: neither folder says which start came first."""
    first = {LOSS: dict.fromkeys(range(1, 11), 1.0), "validation_metrics/loss": {1: 1.0, 5: 1.0, 9: 1.0}}
    write_log(tmp_path, first, time=100, folder=folders[0])
    write_log(tmp_path, {LOSS: {6: 2.0, 7: 2.0}}, time=200, folder=folders[1])
    write_log(tmp_path, {}, time=300)  # ended before its first line
    read = plot_run.read_run(tmp_path)
    assert read[LOSS] == {1: 1, 2: 1, 3: 1, 4: 1, 5: 1, 6: 2, 7: 2}
    assert read["validation_metrics/loss"] == {1: 1, 5: 1}
    write_log(tmp_path, {LOSS: {1: 3.0}}, time=400)  # begun anew, this time without validation
    assert plot_run.read_run(tmp_path) == {LOSS: {1: 3}}


def test_one_run_is_drawn_with_its_levels(tmp_path, draw):
    losses = {f"loss_metrics/level_{level}": {1: level, 2: level} for level in range(11)}
    logged = {LOSS: {1: 5, 2: math.nan}, **losses, "lr": {1: 1, 2: 1}, "time_metrics/data_loading(%)": {1: 2}}
    picture = tmp_path / "new" / "run.png"
    drawn, printed = draw(picture, write_log(tmp_path / "run", logged))
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert printed == f"1 run drawn to {picture}: {tmp_path / 'run'} (steps 1 to 2)\n"
    by_title = {axis.get_title(loc="left"): axis for axis in drawn.axes}
    assert list(by_title) == ["Training loss", "Fraction of time (%)", "Learning rate"]  # the rest was not logged
    levels = [list(line.get_ydata()) for line in by_title["Training loss"].get_lines()][:-1]
    assert levels == [[level, level] for level in range(11)]
    assert by_title["Training loss"].get_legend_handles_labels()[1] == ["level 0", "10", "mean"]
    assert [line.get_label() for line in by_title["Fraction of time (%)"].get_lines()] == ["data"]


def test_several_runs_are_compared_by_their_totals(tmp_path, draw):
    level = {"loss_metrics/level_0": {1: 3.0}}
    write_log(tmp_path / "a", {LOSS: {1: 1.0}, "throughput/mfu(%)": {1: 40.0}, **level})
    write_log(tmp_path / "b", {LOSS: {2: 2.0, 4: 1.5}, "throughput/mfu(%)": {2: 50.0}, "lr": {2: 1.0}, **level})
    runs = [tmp_path / "a", tmp_path / "b"]
    drawn, printed = draw(tmp_path / "both.pdf", *runs)
    assert printed.startswith("2 runs drawn") and "b (steps 2 to 4)" in printed
    lines = {axis.get_title(loc="left"): axis.get_lines() for axis in drawn.axes}
    a, b = ((str(run), f"C{number}") for number, run in enumerate(runs))
    assert {title: [(line.get_label(), line.get_color()) for line in of] for title, of in lines.items()} == {
        "Training loss, mean": [a, b],
        "Model FLOPs utilization (%)": [a, b],
        "Learning rate": [b],
    }
    (legend,) = drawn.legends
    assert [text.get_text() for text in legend.get_texts()] == [str(run) for run in runs]


def test_mistakes_get_one_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    no_step = write_log(tmp_path / "no_step", {"validation_metrics/loss": {1: 1.0}})
    run = write_log(tmp_path / "run", {LOSS: {1: 1.0}})
    for folder, picture, message in (
        (tmp_path / "missing", "a.png", "missing' is not a folder; name a run's dump folder"),
        (tmp_path / "empty", "a.png", "has no log with a training step"),
        (no_step, "a.png", "has no log with a training step"),
        (run, "a.odd", "cannot be written as 'odd'"),
        (run, "a", "cannot be written as ''"),
    ):
        with pytest.raises(UserError, match=message):
            plot_run.plot_runs([folder], tmp_path / picture)
