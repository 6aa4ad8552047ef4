"""Text corpora for the task "text"."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llama_mimi.common.errors import UserError
from llama_mimi.corpora.clips import SkippedClip
from llama_mimi.corpora.formats import open_source
from llama_mimi.corpora.source import Row


@dataclass(frozen=True)
class TextClip:
    """A document."""

    name: str
    text: str  # can be blank
    is_cut: bool = False
    audio_warnings: tuple[str, ...] = ()


@dataclass
class TextCorpus:
    """Reader of documents: the lines of text files, or the rows of a data set in another format."""

    name: str  # see `open_source`
    column: str  # column of the documents; text files do not need a column

    def __post_init__(self) -> None:
        self._source = open_source(self.name, None, "", self.column)
        self.fingerprint = self._source.fingerprint
        sizes = [unit.num_rows for unit in self._source.units]
        if None in sizes:
            raise UserError(f"training cannot read the tar files of '{self.name}'; convert the texts to JSONL")
        self.rows_per_unit = np.array(sizes)

    def read(self, unit: int) -> Sequence[Row]:
        """Return all rows of a unit."""
        return list(self._source.rows(unit))

    def clips(self, row: Row) -> list[TextClip | SkippedClip]:
        """Convert a row, as returned by `read`, to a list of one document."""
        if (problem := row.get("problem")) is not None:
            return [SkippedClip("damaged row", f"'{row['name']}' cannot be used: {problem}")]
        if row["text"] is None:
            return [SkippedClip("no text", f"'{row['name']}' has no text", is_filtered=True)]
        return [TextClip(row["name"], row["text"])]
