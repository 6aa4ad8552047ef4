"""Speech corpora as audio, in the formats that one downloads: rows by group, reached without reading what lies before.

Audio stays undecoded here: bytes are turned into samples by `llama_mimi.audio.reading`. A format is one file with a
class of this protocol, and a line in `open_corpus`.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Protocol

import numpy as np
import pyarrow as pa

from llama_mimi.data.corpus_files import corpus_files, is_dataset
from llama_mimi.data.folder_corpus import FolderCorpus
from llama_mimi.data.manifest_corpus import ManifestCorpus
from llama_mimi.data.parquet_corpus import ParquetCorpus
from llama_mimi.data.tar_corpus import TarCorpus


class AudioCorpus(Protocol):
    """Rows of audio in groups, which are the unit of reading and of the order."""

    name: str
    rows_per_group: np.ndarray  # rows of each group
    fingerprint: str  # equal for corpora of equal content

    @property
    def columns(self) -> list[str]:
        """Names of the columns as used here: audio, and text, id, speaker and others that were asked for."""
        ...

    def row_name(self, group: int, row: int) -> str:
        """Name of a row that has no id."""
        ...

    def read_group(self, group: int) -> pa.Table:
        """One group: ``audio{bytes, path}`` and the other columns.

        A part of a longer recording has ``offset`` and ``duration`` in seconds, a row that cannot be used its
        ``problem``.

        Raises:
            UserError: a file is damaged.
        """
        ...

    def open_path(self, path: str, group: int) -> str | bytes:
        """Return a local path for the ``path`` of a row, or the bytes of a remote file.

        Raises:
            OSError: a remote file cannot be read.
        """
        ...


FORMATS: dict[str, Callable[..., AudioCorpus]] = {
    "parquet": ParquetCorpus,
    "tar": TarCorpus,
    "audio": FolderCorpus,
    "manifest": ManifestCorpus,
    "compressed tar": TarCorpus,  # which refuses it
}


def open_corpus(
    dataset: str,
    dataset_path: str | None,
    audio_column: str,
    text_column: str | None,
    extra_columns: Mapping[str, str] = MappingProxyType({}),
    split: str | None = None,
) -> AudioCorpus:
    """Find a corpus and the places of its rows.

    Args:
        dataset: a name in `CORPORA`, a folder, a path or glob, a folder of `Dataset.save_to_disk`, or a hub id as
            ``hf:owner/name`` or ``hf:owner/name:config``.
        dataset_path: local download of a named corpus; None reads it from the hub.
        text_column: column of transcripts; None means that rows have no text.
        extra_columns: our names of further columns, and theirs; they are read where the corpus has them.
        split: split of a folder or a hub id that contains several.

    Raises:
        UserError: nothing there, several splits, or a column is missing.
    """
    if is_dataset(dataset):
        from llama_mimi.data.dataset_corpus import open_dataset  # datasets takes seconds to import

        return open_dataset(dataset, audio_column, text_column, extra_columns, split)
    kind, files = corpus_files(dataset, dataset_path, split)
    return FORMATS[kind](dataset, files, audio_column, text_column, extra_columns)
