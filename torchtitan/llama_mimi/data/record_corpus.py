"""What formats share whose rows are records: lines of JSON, or files with something said about them."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from llama_mimi.common.errors import UserError, first_line
from llama_mimi.data.row_filter import ROLE

ROWS_PER_GROUP = 100  # as `datasets` writes audio to Parquet
AUDIO = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@dataclass(frozen=True)
class Record:
    """A row: values by the names of its source, and the bytes or the path of its audio file."""

    values: Mapping[str, Any]
    content: bytes | None = None
    path: str | None = None
    row_id: str | None = None
    offset: float | None = None  # of the part of the file in seconds; None is the beginning
    duration: float | None = None  # None is the end
    problem: str | None = None  # why it cannot be used


class RecordTable:
    """Tables of records; columns are inferred from the first group of records.

    Raises:
        UserError: there is no text column.
    """

    def __init__(
        self, name: str, first: Iterable[Record], text_column: str | None, extra_columns: Mapping[str, str]
    ) -> None:
        columns = list(dict.fromkeys(str(key) for record in first for key in record.values))
        self._roles = {role: column for role, column in extra_columns.items() if column in columns}
        if text_column is not None:
            if text_column not in columns:
                raise UserError(
                    f"the dataset '{name}' has no column '{text_column}' for the text, only "
                    f"{', '.join(columns) or 'none'}; say which it is (data.text_column, or --text_column of a script)"
                )
            self._roles["text"] = text_column

    @property
    def columns(self) -> list[str]:
        return ["audio", "id", *self._roles]

    def table(self, records: Sequence[Record]) -> pa.Table:
        """Rows as `AudioCorpus.read_group` has them."""
        records = [_encodable(record) for record in records]
        columns = {
            "audio": pa.array([{"bytes": one.content, "path": one.path} for one in records], AUDIO),
            "id": pa.array([one.row_id for one in records], pa.string()),
            "problem": pa.array([one.problem for one in records], pa.string()),
            "offset": pa.array([one.offset for one in records], pa.float64()),
            "duration": pa.array([one.duration for one in records], pa.float64()),
        }
        for role, column in self._roles.items():
            values = [one.values.get(column) for one in records]
            columns[role] = _typed(values) if role.startswith(ROLE) else _texts(values)
        return pa.table(columns)


def _encodable(record: Record) -> Record:
    """Replace a row with half a character in it, or nested too deeply, which cannot be stored, by one bad row."""
    try:
        for text in (record.path, record.row_id, json.dumps(dict(record.values), ensure_ascii=False)):
            (text or "").encode()
    except (UnicodeEncodeError, RecursionError) as error:
        name = None if record.row_id is None else record.row_id.encode(errors="backslashreplace").decode()
        return Record({}, row_id=name, problem=f"it cannot be stored ({first_line(error)})")
    return record


def group_sizes(num_rows: int) -> list[int]:
    """Rows of each group of a file."""
    return [min(ROWS_PER_GROUP, num_rows - start) for start in range(0, num_rows, ROWS_PER_GROUP)]


def groups_of_files(rows: Sequence[int], name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Groups of files with so many rows each: the file, the first row in it, and the rows, each (G,).

    Raises:
        UserError: there are no rows.
    """
    groups = [
        (file, number * ROWS_PER_GROUP, size)
        for file, num_rows in enumerate(rows)
        for number, size in enumerate(group_sizes(num_rows))
    ]
    if not groups:
        raise UserError(f"the dataset '{name}' has no rows; name another")
    file_G, first_G, rows_per_group = np.array(groups, dtype=np.int64).T
    return file_G, first_G, rows_per_group


def seconds_of(value: Any) -> float | None:
    """Return a number of seconds, or None; raise a ValueError where it is not a number of 0 or more."""
    if value is None:
        return None
    seconds = float(value)
    if not 0 <= seconds < math.inf:
        raise ValueError(f"{value} is not a number of seconds")
    return seconds


def _typed(values: list[Any]) -> pa.Array:
    """Values as their source has them, or as texts where they have several types."""
    try:
        return pa.array(values)
    except (ValueError, TypeError, OverflowError):
        return _texts(values)


def _texts(values: list[Any]) -> pa.Array:
    return pa.array(
        [v if v is None or isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values], pa.string()
    )
