"""Training curves from TensorBoard logs."""

from pathlib import Path

Series = dict[int, float]  # step -> value


def read_curves(folder: Path) -> dict[str, Series]:
    """Return the curves in a dump folder, by tag. If a resumed run has logged a step again, use the later value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves: dict[str, Series] = {}
    # File names begin with the time in seconds. Folder names have only minutes.
    for file in sorted((folder / "tb").rglob("events.out.tfevents.*"), key=lambda file: file.name):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()  # load all values, not a sample
        logged = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
        start = min((step for values in logged.values() for step in values), default=float("inf"))
        kept = {tag: {step: v for step, v in values.items() if step < start} for tag, values in curves.items()}
        curves = {tag: kept.get(tag, {}) | logged.get(tag, {}) for tag in kept | logged}
    return {tag: values for tag, values in curves.items() if values}
