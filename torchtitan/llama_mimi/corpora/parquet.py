"""Parquet files of audio, by row group."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq

from llama_mimi.common.errors import UserError, first_line
from llama_mimi.common.files import digest, file_system
from llama_mimi.corpora.source import OTHER_COLUMN, Columns, Row, Source, Unit, reading

FOOTER_THREADS = 16  # that read footers at once: a remote one is mostly waiting
# A row group that is larger by its footer is read in parts of a quarter of that; in memory it may have twice as many.
MAX_GROUP_BYTES = 2**31
ROWS_AT_ONCE = 16
TEXT = "string large_string string_view binary large_binary binary_view null".split()


class ParquetSource(Source):
    """A unit is a row group of ``{"audio": {"bytes", "path"}, "text": str, "id": str}``, or a part of a large one."""

    def __init__(self, name: str, files: Sequence[str], wanted: Columns) -> None:
        super().__init__(name, wanted)
        with ThreadPoolExecutor(FOOTER_THREADS) as pool:
            contents = list(pool.map(_contents, files))
        for file, (schema, _) in zip(files, contents, strict=True):
            self._choose_columns(schema.names, ("audio", "text"), f"'{file}' of the dataset '{name}'")
        in_all = set.intersection(*(set(schema.names) for schema, _ in contents))
        self._choose_columns(in_all, ("audio", "text"))
        for file, (schema, _) in zip(files, contents, strict=True):
            self._check_types(file, schema)
        # File, row group and first row of each unit.
        self._places: list[tuple[str, int, int]] = []
        self.units: list[Unit] = []
        is_split = False
        for file, (_, groups) in zip(files, contents, strict=True):
            for number, (num_rows, num_bytes) in enumerate(groups):
                size = num_rows if num_bytes <= MAX_GROUP_BYTES else num_rows * (MAX_GROUP_BYTES // 4) // num_bytes
                for first in (starts := range(0, num_rows, max(1, size))):
                    rows = min(starts.step, num_rows - first)
                    self._places.append((file, number, first))
                    self.units.append(Unit(f"row group {number} of {file}", num_bytes * rows // num_rows, rows))
                    is_split |= rows < num_rows
        if not self.units:
            raise UserError(f"the dataset '{name}' has no rows; choose another")
        # File names, rows and bytes of row groups, and the rows of the parts of large ones.
        content = [[file.rsplit("/", 1)[-1] for file in files], [groups for _, groups in contents]]
        self.fingerprint = digest([*content, [unit.num_rows for unit in self.units]] if is_split else content)

    def rows(self, unit: int, start: int = 0) -> Iterator[Row]:
        path, number, first = self._places[unit]
        at, num_bytes = first, 0
        fs, bare = file_system(path)
        with reading(path, "Parquet file"), fs.open(bare) as stream:
            file = pq.ParquetFile(stream)
            # A value of a dictionary is as large as the row group at most, and each row may have it.
            at_once = max(1, MAX_GROUP_BYTES // max(1, file.metadata.row_group(number).total_byte_size))
            columns = list(set(self._columns.values()))
            batches = file.iter_batches(min(at_once, ROWS_AT_ONCE), row_groups=[number], columns=columns)
            # In a part of a row group, a batch is a row.
            for batch in islice(batches, first, first + int(self.units[unit].num_rows or 0)):
                num_bytes += batch.nbytes
                if num_bytes > 2 * MAX_GROUP_BYTES:
                    problem = f"takes more than {2 * MAX_GROUP_BYTES:,} bytes of memory, and its footer says less"
                    remedy = "write the file again with fewer rows in a row group"
                    raise UserError(f"row group {number} of '{path}' {problem}; {remedy}")
                for index in range(batch.num_rows):
                    if at >= first + start:
                        yield self._of_batch(batch, index, f"row {at} of {self.units[unit].name}", path)
                    at += 1

    def _of_batch(self, batch: pa.RecordBatch, index: int, place: str, path: str) -> Row:
        try:
            values = {column: batch.column(column)[index].as_py() for column in self._columns.values()}
        except ValueError as error:
            return {"name": place, "problem": f"its text is not UTF-8 ({first_line(error)})"}
        return self._row(place, values, values[self._wanted.audio], values.get("id"), path.rsplit("/", 1)[0])

    def _check_types(self, file: str, schema: pa.Schema) -> None:
        place = f"of '{file}' of the dataset '{self.name}'"
        for role, column in self._columns.items():
            if (number := schema.names.count(column)) > 1:
                raise UserError(f"the column '{column}' {place} exists {number} times; rename all but one")
            kind = schema.field(column).type
            inner = kind.value_type if pa.types.is_dictionary(kind) else kind
            is_text = any(getattr(pa.types, f"is_{name}")(inner) for name in TEXT)
            allowed = {
                "audio": pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0,
                "text": is_text,
                "speaker": is_text or pa.types.is_integer(kind) or pa.types.is_floating(kind),
            }
            if not allowed.get(role, True):
                problem = f"the column '{column}' {place} is {kind}, which cannot be the {role}"
                raise UserError(f"{problem}; {OTHER_COLUMN.format(role)}")


def read_footer(path: str) -> pq.FileMetaData:
    """Return the metadata of a Parquet file, or raise a `UserError`."""
    fs, bare = file_system(path)
    with reading(path, "Parquet file"), fs.open(bare) as stream:
        return pq.read_metadata(stream)


def _contents(path: str) -> tuple[pa.Schema, list[tuple[int, int]]]:
    """Return the schema of a file, and rows and bytes of its row groups; there may be too many footers to keep."""
    footer = read_footer(path)
    groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
    schema = footer.schema.to_arrow_schema().remove_metadata()
    return schema, [(group.num_rows, group.total_byte_size) for group in groups]
