"""Text corpora for the task "text"."""

from llama_mimi.corpora.clips import CodedClip, SkippedClip, SourceReader
from llama_mimi.corpora.formats import open_source
from llama_mimi.corpora.source import Row


class TextCorpus(SourceReader):
    """Reader of documents: the lines of text files, or the rows of a data set in another format.

    Args:
        name: see `open_source`.
        column: column of the documents; text files do not need a column.
    """

    def __init__(self, name: str, column: str) -> None:
        super().__init__(open_source(name, None, "", column))

    def clips(self, row: Row) -> list[CodedClip | SkippedClip]:
        """Convert a row to a list of one document."""
        if (problem := row.get("problem")) is not None:
            return [SkippedClip("damaged row", f"'{row['name']}' cannot be used: {problem}")]
        if row["text"] is None:
            return [SkippedClip("no text", f"'{row['name']}' has no text", is_filtered=True)]
        return [CodedClip(row["name"], text=row["text"])]
