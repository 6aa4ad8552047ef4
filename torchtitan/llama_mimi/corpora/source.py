"""Interface between the formats of corpora and their readers. Audio stays undecoded here."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

# A row has "name" and "audio": the bytes of an audio file, its path (local or any fsspec path), or None. It may have
# "text", "speaker", "offset" and "duration" (of a part of a recording, in seconds), "problem" (why it cannot be used),
# and the columns that a filter names.
Row = dict[str, Any]


@dataclass(frozen=True)
class Unit:
    """Rows that are read together and in order: a tar file, a Parquet row group, or a slice of files, lines or rows."""

    name: str
    num_bytes: int
    num_rows: int | None  # None: known only after reading, as of a tar file


class Source(Protocol):
    """A corpus in one of the formats."""

    name: str
    units: Sequence[Unit]
    columns: Sequence[str]  # keys of all rows, except "name"
    fingerprint: str  # equal for corpora of equal content

    def rows(self, unit: int, start: int = 0) -> Iterator[Row]:
        """Yield the rows of a unit in order, from number ``start`` on; raise a `UserError` if a file is damaged."""
        ...
