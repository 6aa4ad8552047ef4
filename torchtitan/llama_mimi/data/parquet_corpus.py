"""Parquet files of audio, by row group."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llama_mimi.common.errors import UserError, first_line
from llama_mimi.common.files import digest, file_system
from llama_mimi.data.corpus_files import open_beside
from llama_mimi.data.row_filter import ROLE

# Footers are read by so many threads at once: a remote one is mostly waiting.
FOOTER_THREADS = 16
# A row group that is larger by its footer is read in parts of a quarter of that; in memory it may have twice as many.
MAX_GROUP_BYTES = 2**31
ROWS_AT_ONCE = 16


class ParquetCorpus:
    """Rows ``{"audio": {"bytes", "path"}, "text": str, "id": str}`` of Parquet files, read by row group or part of one.

    Raises:
        UserError: a file cannot be read, or a column is missing.
    """

    def __init__(
        self,
        name: str,
        files: Sequence[str],
        audio_column: str,
        text_column: str | None,
        extra_columns: Mapping[str, str],
    ) -> None:
        self.name, self.files = name, tuple(files)
        with ThreadPoolExecutor(FOOTER_THREADS) as pool:
            contents = list(pool.map(_contents, self.files))
        # Our name of each column (audio, text, id, ...), and its name in the files.
        self._columns = {"audio": audio_column} | ({"text": text_column} if text_column is not None else {})
        in_all = set.intersection(*(set(schema.names) for schema, _ in contents))
        self._columns |= {role: column for role, column in extra_columns.items() if column in in_all}
        if all(_is_text(schema, "id") or _is_number(schema, "id") for schema, _ in contents):
            self._columns["id"] = "id"
        for file, (schema, _) in zip(self.files, contents, strict=True):
            self._check_columns(file, schema)
        groups = [
            (file, number, first, size)
            for file, (_, row_groups) in enumerate(contents)
            for number, row_group in enumerate(row_groups)
            for first, size in _parts(*row_group)
        ]
        if not groups:
            raise UserError(f"the dataset '{name}' has no rows; name another")
        # Each group G: its file, the number of its row group in the file, its first row there, and its rows.
        self._file_G, self._number_G, self._first_G, self.rows_per_group = np.array(groups, dtype=np.int64).T
        names = [file.rsplit("/", 1)[-1] for file in self.files]
        # Equal for corpora of equal order: file names, rows and bytes of their row groups, and the parts of large ones.
        sizes, parts = [sizes for _, sizes in contents], self.rows_per_group.tolist()
        is_split = parts != [num_rows for of_file in sizes for num_rows, _ in of_file if num_rows]
        self.fingerprint = digest([names, sizes, parts] if is_split else [names, sizes])

    @property
    def columns(self) -> list[str]:
        return list(self._columns)

    def row_name(self, group: int, row: int) -> str:
        place = self._first_G[group] + row
        return f"row {place} of row group {self._number_G[group]} of {self.files[self._file_G[group]]}"

    def read_group(self, group: int) -> pa.Table:
        path, number = self.files[self._file_G[group]], int(self._number_G[group])
        batches, num_bytes = [], 0
        try:
            fs, bare = file_system(path)
            with fs.open(bare) as stream:
                columns = list(set(self._columns.values()))
                file = pq.ParquetFile(stream)
                # A value of a dictionary is as large as the row group at most, and each row may have it.
                at_once = MAX_GROUP_BYTES // max(1, file.metadata.row_group(number).total_byte_size)
                found = file.iter_batches(min(max(1, at_once), ROWS_AT_ONCE), row_groups=[number], columns=columns)
                # In a part of a row group, a batch is a row.
                for batch in islice(found, self._first_G[group], self._first_G[group] + self.rows_per_group[group]):
                    batches.append(batch)
                    num_bytes += batch.nbytes
                    if num_bytes > 2 * MAX_GROUP_BYTES:
                        raise UserError(
                            f"row group {number} of '{path}' takes more than {2 * MAX_GROUP_BYTES:,} bytes of memory, "
                            "and its footer says less; write the file again with fewer rows in a row group"
                        )
            table = pa.Table.from_batches(batches)
        except (OSError, ValueError, pa.ArrowException) as error:  # a ValueError where there are no rows
            raise unreadable(path, error) from error
        return pa.table({role: table[column] for role, column in self._columns.items()})

    def open_path(self, path: str, group: int) -> str | bytes:
        return open_beside(path, self.files[self._file_G[group]])

    def _check_columns(self, file: str, schema: pa.Schema) -> None:
        for role, column in self._columns.items():
            remedy = f"say which it is (data.{role}_column, or --{role}_column of a script)"
            where = f"in '{file}' of the dataset '{self.name}'"
            if (number := schema.names.count(column)) == 0:
                raise UserError(
                    f"'{file}' of the dataset '{self.name}' has no column '{column}' for the {role}, only "
                    f"{', '.join(schema.names)}; {remedy}"
                )
            if number > 1:
                raise UserError(f"the column '{column}' {where} stands there {number} times; rename all but one")
            kind = schema.field(column).type
            if role == "audio" and not (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0):
                raise UserError(
                    f"the column '{column}' {where} is {kind}, not a struct of audio bytes and path; {remedy}"
                )
            is_label = role == "speaker" and _is_number(schema, column)
            is_other = is_label or role in ("audio", "id") or role.startswith(ROLE)
            if not is_other and not _is_text(schema, column):
                raise UserError(f"the column '{column}' {where} is {kind}, which is no {role}; {remedy}")


def _is_text(schema: pa.Schema, column: str) -> bool:
    """Return True for a column of strings, or bytes of them."""
    if schema.names.count(column) != 1:
        return False
    kind = schema.field(column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    types = "string large_string string_view binary large_binary binary_view null".split()
    return any(getattr(pa.types, f"is_{name}")(kind) for name in types)


def _is_number(schema: pa.Schema, column: str) -> bool:
    if schema.names.count(column) != 1:
        return False
    kind = schema.field(column).type
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def read_footer(path: str) -> pq.FileMetaData:
    """Return the metadata of a Parquet file, or raise a UserError."""
    fs, bare = file_system(path)
    try:
        with fs.open(bare) as stream:
            return pq.read_metadata(stream)
    except (OSError, pa.ArrowException) as error:
        raise unreadable(path, error) from error


def _parts(num_rows: int, num_bytes: int) -> list[tuple[int, int]]:
    """Return the first row and the number of rows of each part of a row group; one part unless it is too large."""
    size = num_rows if num_bytes <= MAX_GROUP_BYTES else num_rows * (MAX_GROUP_BYTES // 4) // num_bytes
    return [(first, min(max(1, size), num_rows - first)) for first in range(0, num_rows, max(1, size))]


def _contents(path: str) -> tuple[pa.Schema, list[tuple[int, int]]]:
    """Schema of a file, and rows and bytes of its row groups; there may be too many footers to keep."""
    footer = read_footer(path)
    groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
    schema = footer.schema.to_arrow_schema().remove_metadata()
    return schema, [(group.num_rows, group.total_byte_size) for group in groups]


def unreadable(path: str, error: Exception) -> UserError:
    what = first_line(error)
    return UserError(f"'{path}' is not a readable Parquet file ({what}); fix the cause, or copy it again")
