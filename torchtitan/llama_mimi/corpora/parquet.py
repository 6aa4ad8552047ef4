"""Corpora in Parquet files."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq

from llama_mimi.common.errors import UserError, first_line
from llama_mimi.common.files import digest, file_system
from llama_mimi.corpora.source import Columns, Row, Source, Unit, reading

FOOTER_THREADS = 16  # number of threads that read footers; a remote read is mostly waiting
# Maximum size of a unit in bytes, according to the file's footer. A larger row group is divided into units of a quarter
# of this size. In memory, a unit may take twice this size.
MAX_GROUP_BYTES = 2**31
ROWS_AT_ONCE = 16


class ParquetSource(Source):
    """Source for Parquet files. A unit is a row group, or a part of one. The audio column has bytes and paths."""

    def __init__(self, name: str, files: Sequence[str], wanted: Columns) -> None:
        super().__init__(name, wanted)
        with ThreadPoolExecutor(FOOTER_THREADS) as pool:
            contents = list(zip(files, pool.map(_contents, files), strict=True))
        for file, (names, _) in contents:
            self._choose_columns(names, ("audio", "text"), f"'{file}' of the dataset '{name}'")
        self._choose_columns(set.intersection(*(set(names) for _, (names, _) in contents)), ("audio", "text"))
        self.units: list[Unit] = []  # place: file, row group, first row
        for file, (_, groups) in contents:
            for number, (num_rows, num_bytes) in enumerate(groups):
                size = num_rows if num_bytes <= MAX_GROUP_BYTES else num_rows * (MAX_GROUP_BYTES // 4) // num_bytes
                for first in (starts := range(0, num_rows, max(1, size))):
                    rows = min(starts.step, num_rows - first)
                    self.units.append(Unit(num_bytes * rows // num_rows, rows, (file, number, first)))
        if not self.units:
            raise UserError(f"the dataset '{name}' has no rows; choose another dataset")
        names = [file.rsplit("/", 1)[-1] for file in files]
        self.fingerprint = digest([names, [groups for _, (_, groups) in contents]])

    def rows(self, unit: int, start: int = 0) -> Iterator[Row]:
        path, number, first = self.units[unit].place
        at, num_bytes = first, 0
        fs, bare = file_system(path)
        with reading(path, "Parquet file"), fs.open(bare) as stream:
            file = pq.ParquetFile(stream)
            # Equal values are stored once, so each row may take as much memory as the whole row group has on disk.
            at_once = max(1, MAX_GROUP_BYTES // max(1, file.metadata.row_group(number).total_byte_size))
            columns = list(set(self._columns.values()))
            batches = file.iter_batches(min(at_once, ROWS_AT_ONCE), row_groups=[number], columns=columns)
            # If the unit is a part of a row group, a batch has one row.
            for batch in islice(batches, first, first + int(self.units[unit].num_rows or 0)):
                num_bytes += batch.nbytes
                if num_bytes > 2 * MAX_GROUP_BYTES:
                    problem = f"needs over {2 * MAX_GROUP_BYTES:,} bytes of memory, more than the file's footer says"
                    remedy = "write the file again with fewer rows in each row group"
                    raise UserError(f"row group {number} of '{path}' {problem}; {remedy}")
                for index in range(batch.num_rows):
                    if at >= first + start:
                        place = f"row {at} of row group {number} of {path}"
                        yield self._of_batch(batch, index, place, path.rsplit("/", 1)[0])
                    at += 1

    def _of_batch(self, batch: pa.RecordBatch, index: int, place: str, folder: str) -> Row:
        try:
            values = {column: batch.column(column)[index].as_py() for column in self._columns.values()}
        except ValueError as error:
            return {"name": place, "problem": f"its text is not UTF-8 ({first_line(error)})"}
        return self._row(place, values, values.get(self._wanted.audio), values.get("id"), folder)


def _contents(path: str) -> tuple[list[str], list[tuple[int, int]]]:
    """Return the column names of a file, and the number of rows and bytes of each row group."""
    fs, bare = file_system(path)
    with reading(path, "Parquet file"), fs.open(bare) as stream:
        footer = pq.read_metadata(stream)
    groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
    return footer.schema.to_arrow_schema().names, [(group.num_rows, group.total_byte_size) for group in groups]
