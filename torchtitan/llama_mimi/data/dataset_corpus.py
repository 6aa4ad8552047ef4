"""What the library `datasets` reads: folders of ``save_to_disk``, and any id on the hub."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Audio, ClassLabel, Dataset, DatasetDict, Value, load_dataset, load_from_disk

from llama_mimi.common.errors import UserError, first_line
from llama_mimi.common.files import digest, file_system, is_local
from llama_mimi.data.corpus_files import HUB
from llama_mimi.data.record_corpus import ROWS_PER_GROUP, group_sizes

TEXTS = ("text", "speaker", "id")


class DatasetCorpus:
    """A `datasets.Dataset`, whose Arrow files are mapped into memory.

    Raises:
        UserError: a column is missing, or there are no rows.
    """

    def __init__(
        self,
        name: str,
        dataset: Dataset,
        audio_column: str,
        text_column: str | None,
        extra_columns: Mapping[str, str],
    ) -> None:
        self.name = name
        wanted = {"audio": audio_column} | ({} if text_column is None else {"text": text_column})
        for role, column in wanted.items():
            if column not in dataset.column_names:
                raise UserError(
                    f"the dataset '{name}' has no column '{column}' for the {role}, only "
                    f"{', '.join(dataset.column_names)}; say which it is (data.{role}_column, or --{role}_column of a "
                    "script)"
                )
        if not isinstance(dataset.features[audio_column], Audio):
            raise UserError(f"the column '{audio_column}' of '{name}' is no audio; say which is (data.audio_column)")
        for role, column in {**wanted, **extra_columns, "id": "id"}.items():
            kind = dataset.features.get(column)
            if role in TEXTS and kind is not None and not isinstance(kind, Value):
                raise UserError(f"the column '{column}' of '{name}' is {kind}, which is no {role}; name another")
        self._roles = wanted | {role: c for role, c in extra_columns.items() if c in dataset.column_names}
        if "id" in dataset.column_names:
            self._roles["id"] = "id"
        self._rows = dataset.cast_column(audio_column, Audio(decode=False)).with_format("arrow")
        self.rows_per_group = np.array(group_sizes(len(dataset)), dtype=np.int64)
        if not len(self.rows_per_group):
            raise UserError(f"the dataset '{name}' has no rows; name another")
        files = [file["filename"].rsplit("/", 1)[-1] for file in dataset.cache_files]
        self.fingerprint = digest([files, len(dataset), dataset.data.nbytes, dataset._fingerprint])

    @property
    def columns(self) -> list[str]:
        return list(self._roles)

    def row_name(self, group: int, row: int) -> str:
        return f"row {group * ROWS_PER_GROUP + row} of {self.name}"

    def read_group(self, group: int) -> pa.Table:
        start = group * ROWS_PER_GROUP
        table = self._rows[start : start + int(self.rows_per_group[group])]
        columns = {role: self._named(column, table[column]) for role, column in self._roles.items()}
        return pa.table({role: c.cast(pa.string()) if role in TEXTS else c for role, c in columns.items()})

    def _named(self, column: str, values: pa.ChunkedArray) -> pa.ChunkedArray | pa.Array:
        """Values of a column, which are names where it has a `ClassLabel`."""
        feature = self._rows.features[column]
        if not isinstance(feature, ClassLabel):
            return values
        return pa.array(map(dict(enumerate(feature.names)).get, values.to_pylist()), pa.string())

    def open_path(self, path: str, group: int) -> str | bytes:
        fs, bare = file_system(path)
        return bare if is_local(fs) else fs.cat_file(bare)


def open_dataset(
    name: str, audio_column: str, text_column: str | None, extra_columns: Mapping[str, str], split: str | None
) -> DatasetCorpus:
    """A folder of ``save_to_disk``, or ``hf:owner/name`` or ``hf:owner/name:config``.

    Raises:
        UserError: it cannot be loaded, or there are several splits and it is not said which.
    """
    try:
        if name.startswith(HUB):
            hub_id, _, config = name.removeprefix(HUB).partition(":")
            found: Any = load_dataset(hub_id, config or None, split=split)
            split = None
        else:
            found = load_from_disk(name)
    except Exception as error:  # datasets and the hub's client raise what their readers raise
        raise UserError(f"the dataset '{name}' could not be loaded ({first_line(error)}); check its name") from error
    if isinstance(found, DatasetDict):
        if split is None and len(found) > 1:
            raise UserError(
                f"'{name}' holds the splits {', '.join(found)}; choose one (data.split, data.validation_split, or "
                "--split of a script)"
            )
        if split is not None and split not in found:
            raise UserError(f"the split '{split}' was asked for, but '{name}' holds {', '.join(found)}; choose one")
        found = found[split] if split is not None else next(iter(found.values()))
    elif split is not None:
        raise UserError(f"the split '{split}' was asked for, but '{name}' is one alone; leave it out")
    return DatasetCorpus(name, found, audio_column, text_column, extra_columns)
