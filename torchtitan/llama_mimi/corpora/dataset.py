"""Corpora that the library `datasets` loads: folders written by ``save_to_disk``, and datasets on the hub."""

from collections.abc import Iterator
from typing import Any

from datasets import Audio, ClassLabel, Dataset, DatasetDict, load_dataset, load_from_disk

from llama_mimi.common.errors import UserError, first_line
from llama_mimi.common.files import digest
from llama_mimi.corpora.source import HUB, ROWS_PER_UNIT, Columns, Row, Source, Unit, choose_split, slices


class DatasetSource(Source):
    """Source for a memory-mapped `datasets.Dataset`. A unit has 100 rows."""

    def __init__(self, name: str, wanted: Columns, split: str | None) -> None:
        super().__init__(name, wanted)
        dataset = _load(name, split)
        self._choose_columns(dataset.column_names, ("audio", "text"))
        if not len(dataset):
            raise UserError(f"the dataset '{name}' has no rows; choose another dataset")
        if isinstance(dataset.features.get(wanted.audio), Audio):
            dataset = dataset.cast_column(wanted.audio, Audio(decode=False))
        self._rows, size = dataset.with_format("arrow"), dataset.data.nbytes // len(dataset)
        self.units = [Unit((b - a) * size, b - a) for a, b in slices(len(dataset))]
        files = [file["filename"].rsplit("/", 1)[-1] for file in dataset.cache_files]
        self.fingerprint = digest([files, len(dataset), dataset.data.nbytes, dataset._fingerprint])

    def rows(self, unit: int, start: int = 0) -> Iterator[Row]:
        first = unit * ROWS_PER_UNIT
        table = self._rows[first + start : first + ROWS_PER_UNIT]
        features = {column: self._rows.features[column] for column in self._columns.values()}
        labels = {c: dict(enumerate(kind.names)) for c, kind in features.items() if isinstance(kind, ClassLabel)}
        for index in range(len(table)):
            values = {column: table[column][index].as_py() for column in features}
            values |= {column: names.get(values[column]) for column, names in labels.items()}
            place = f"row {first + start + index} of {self.name}"
            yield self._row(place, values, values.get(self._wanted.audio), values.get("id"))


def _load(name: str, split: str | None) -> Dataset:
    """Load a folder saved by `datasets`, or a dataset on the hub (``hf:owner/name`` or ``hf:owner/name:config``)."""
    try:
        if name.startswith(HUB):
            hub_id, _, config = name.removeprefix(HUB).partition(":")
            found: Any = load_dataset(hub_id, config or None, split=split)
            split = None
        else:
            found = load_from_disk(name)
    except Exception as error:  # datasets and the hub's client raise many types of errors
        raise UserError(f"the dataset '{name}' could not be loaded ({first_line(error)}); check its name") from error
    splits = found if isinstance(found, DatasetDict) else {}
    chosen = choose_split(name, splits, split)
    return found[chosen or next(iter(splits))] if splits else found
