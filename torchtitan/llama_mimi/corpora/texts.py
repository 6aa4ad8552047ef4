"""Text corpora: lines of text files, or the text column of a data set. The library `datasets` reads the files."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llama_mimi.common.errors import UserError, first_line
from llama_mimi.common.files import digest, file_system, find_files
from llama_mimi.corpora.clips import SkippedClip
from llama_mimi.corpora.source import Row, slices

# Formats of `datasets` by file ending. The first format with a file in the folder is used.
FORMATS = {".parquet": "parquet", ".jsonl": "json", ".txt": "text"}


@dataclass(frozen=True)
class TextClip:
    """A document."""

    name: str
    text: str  # can be blank
    is_cut: bool = False
    audio_warnings: tuple[str, ...] = ()


@dataclass
class TextCorpus:
    """Reader of documents: a line of a .txt file, or a row of a .jsonl or .parquet file. A unit has 100 documents."""

    name: str  # folder, file or glob
    column: str  # of .jsonl and .parquet files

    def __post_init__(self) -> None:
        found = find_files(self.name, tuple(FORMATS))
        ending = next((ending for ending in FORMATS if any(file.endswith(ending) for file in found)), None)
        if ending is None:
            remedy = f"set data.text_dataset to a folder, file or glob of {', '.join(FORMATS)} files"
            raise UserError(f"the text corpus '{self.name}' does not contain text; {remedy}")
        files = [file for file in found if file.endswith(ending)]
        column = "text" if ending == ".txt" else self.column
        self._documents = _load(self.name, FORMATS[ending], files, column)
        self.fingerprint = digest([(file, file_system(file)[0].size(file)) for file in files])
        self.rows_per_unit = np.array([end - start for start, end in slices(len(self._documents))])

    def read(self, unit: int) -> Sequence[Row]:
        """Return the rows of a unit."""
        start, end = slices(len(self._documents))[unit]
        texts = self._documents[start:end]
        return [{"name": f"document {start + i} of {self.name}", "text": text} for i, text in enumerate(texts)]

    def clips(self, row: Row) -> list[TextClip | SkippedClip]:
        """Convert a row, as returned by `read`, to a list of one document."""
        if row["text"] is None:
            return [SkippedClip("no text", f"{row['name']} has no text")]
        return [TextClip(row["name"], str(row["text"]))]


def _load(name: str, kind: str, files: list[str], column: str) -> Any:
    """Return a memory-mapped column of files; raise a `UserError` if the files cannot be read."""
    from datasets import Dataset, load_dataset  # takes seconds to import

    try:
        documents = load_dataset(kind, data_files=files, split="train")
    except Exception as error:  # datasets raises many types of errors
        problem = f"the text corpus '{name}' cannot be read ({first_line(error)})"
        raise UserError(f"{problem}; write its files again") from error
    assert isinstance(documents, Dataset)
    if column not in documents.column_names:
        problem = f"the text corpus '{name}' lacks the column '{column}'"
        raise UserError(f"{problem} (columns: {', '.join(documents.column_names)}); set data.text_column")
    if not len(documents):
        raise UserError(f"the text corpus '{name}' does not contain a document; choose another corpus")
    return documents.select_columns([column])[column]
