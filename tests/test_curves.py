"""Training curves: logs of several starts of a run."""

from torch.utils.tensorboard import SummaryWriter

from llama_mimi.report.curves import read_curves

LOSS = "loss_metrics/global_avg_loss"


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
