"""Speech corpora: where they lie, and their clips by row group.

A corpus is a name from `CORPORA`, a folder of Parquet files, or a Parquet path or glob, local or on any fsspec
file system. Audio stays undecoded here: bytes are turned into samples by `llama_mimi.audio`, which needs no FFmpeg.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llama_mimi.errors import UserError
from llama_mimi.files import file_system, find_files

# Footers are read by so many threads at once: a remote one is mostly waiting.
FOOTER_THREADS = 16


@dataclass(frozen=True)
class NamedCorpus:
    """Where a published corpus lies and what its columns are called.

    Args:
        hub_id: dataset repository.
        config: its configuration on the hub, which is also the folder of a local download.
        split: its split, which is also how the Parquet files of a local download begin.
        text_column: transcript.
    """

    hub_id: str
    config: str
    split: str
    text_column: str = "text"


# Layouts as published on the hub: <config>/<split>-*.parquet with columns audio{bytes,path} and text.
CORPORA = {
    "peoples_speech": NamedCorpus("MLCommons/peoples_speech", "clean", "train"),
    "peoples_speech_validation": NamedCorpus("MLCommons/peoples_speech", "validation", "validation"),
    **{
        f"librispeech_{config}_{split}": NamedCorpus("openslr/librispeech_asr", config, split)
        for config, split in (
            ("clean", "train.100"),
            ("clean", "train.360"),
            ("other", "train.500"),
            ("clean", "validation"),
            ("other", "validation"),
            ("clean", "test"),
            ("other", "test"),
        )
    },
}


class AudioCorpus:
    """Rows ``{"audio": {"bytes", "path"}, "text": str, "id": str}`` of Parquet files, read by row group.

    Args:
        name: for messages.
        files: fsspec paths, in corpus order.
        audio_column: column of ``audio{bytes,path}`` structs.
        text_column: transcript column; None means that rows have no text.
        extra_columns: further columns to read where the corpus has them, and what to call them.

    Raises:
        UserError: a file cannot be read, or a column is missing.
    """

    def __init__(
        self,
        name: str,
        files: Sequence[str],
        audio_column: str,
        text_column: str | None,
        extra_columns: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.name, self.files = name, tuple(files)
        with ThreadPoolExecutor(FOOTER_THREADS) as pool:
            contents = list(pool.map(_contents, self.files))
        self._columns = {audio_column: "audio"} | ({text_column: "text"} if text_column is not None else {})
        for file, (schema, _) in zip(self.files, contents, strict=True):
            for column, role in self._columns.items():
                if column not in schema.names:
                    raise UserError(
                        f"'{file}' of the dataset '{name}' has no column '{column}' for the {role}, only "
                        f"{', '.join(schema.names)}; say which it is (data.{role}_column, or --{role}_column of a "
                        "script)"
                    )
            kind = schema.field(audio_column).type
            if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
                raise UserError(
                    f"the column '{audio_column}' in '{file}' of the dataset '{name}' is {kind}, not a struct of audio "
                    "bytes and path; say which it is (data.audio_column, or --audio_column of a script)"
                )
        in_all = set.intersection(*(set(schema.names) for schema, _ in contents))
        for column, role in {"id": "id", **extra_columns}.items():
            if column in in_all and role not in self.columns:
                self._columns[column] = role
        groups = [
            (file, group, size)
            for file, (_, sizes) in enumerate(contents)
            for group, (size, _) in enumerate(sizes)
            if size
        ]
        if not groups:
            raise UserError(f"the dataset '{name}' has no rows; name another")
        # Each row group G as its file, its number in the file, and its rows.
        self._file_G, self._number_G, self.sizes_G = np.array(groups, dtype=np.int64).T
        names = [file.rsplit("/", 1)[-1] for file in self.files]
        # Says whether two corpora hold the same: file names, rows and bytes of their row groups.
        self.fingerprint = digest([names, [sizes for _, sizes in contents]])

    @property
    def columns(self) -> list[str]:
        """What rows hold, as they are called here."""
        return list(self._columns.values())

    def row_name(self, group: int, row: int) -> str:
        """What to call a row without an id."""
        return f"row {row} of row group {self._number_G[group]} of {self.files[self._file_G[group]]}"

    def read_group(self, group: int) -> pa.Table:
        """One row group with columns audio, text and id, as far as the corpus has them.

        Raises:
            UserError: the file is damaged.
        """
        path = self.files[self._file_G[group]]
        try:
            fs, bare = file_system(path)
            with fs.open(bare) as stream:
                table = pq.ParquetFile(stream).read_row_group(int(self._number_G[group]), columns=list(self._columns))
        except (OSError, pa.ArrowException) as error:
            raise unreadable(path, error) from error
        return table.select(list(self._columns)).rename_columns(list(self._columns.values()))


def open_corpus(
    dataset: str,
    dataset_path: str | None,
    audio_column: str,
    text_column: str | None,
    extra_columns: Mapping[str, str] = MappingProxyType({}),
) -> AudioCorpus:
    """Find a corpus and read its footers.

    Args:
        dataset: a name in `CORPORA`, a folder, or a Parquet path or glob.
        dataset_path: local download of a named corpus; None reads it from the hub.
        audio_column, text_column, extra_columns: as `AudioCorpus`; named corpora know their text column.

    Raises:
        UserError: nothing there, or a column is missing.
    """
    named = CORPORA.get(dataset)
    if named is not None and text_column is not None:
        text_column = named.text_column
    files = _corpus_files(dataset, dataset_path)
    return AudioCorpus(dataset, files, audio_column, text_column, extra_columns)


def check_corpus(dataset: str, dataset_path: str | None) -> None:
    """Fail early, without opening a file, if a local corpus is not there.

    Raises:
        UserError: as `open_corpus`.
    """
    if dataset not in CORPORA or dataset_path is not None:
        _corpus_files(dataset, dataset_path)


def parquet_files(dataset: str) -> list[str]:
    """Parquet files of a folder, path or glob, in order, as fsspec paths.

    Raises:
        UserError: there is none.
    """
    files = find_files(dataset, "**/*.parquet")
    if not files:
        raise UserError(
            f"no Parquet file matches the dataset '{dataset}'; name a folder, a Parquet path or glob, "
            f"or one of: {', '.join(CORPORA)}"
        )
    return files


def read_footer(path: str) -> pq.FileMetaData:
    """Metadata of a Parquet file.

    Raises:
        UserError: missing or damaged.
    """
    fs, bare = file_system(path)
    try:
        with fs.open(bare) as stream:
            return pq.read_metadata(stream)
    except (OSError, pa.ArrowException) as error:
        raise unreadable(path, error) from error


def _contents(path: str) -> tuple[pa.Schema, list[tuple[int, int]]]:
    """Schema of a file, and rows and bytes of its row groups; there may be too many footers to keep."""
    footer = read_footer(path)
    groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
    schema = footer.schema.to_arrow_schema().remove_metadata()
    return schema, [(group.num_rows, group.total_byte_size) for group in groups]


def digest(content: Any) -> str:
    """SHA-256 of what JSON can hold."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def unreadable(path: str, error: Exception) -> UserError:
    detail = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return UserError(
        f"'{path}' is no readable Parquet file ({detail}); mend what keeps it from being read, or copy it anew"
    )


def _corpus_files(dataset: str, dataset_path: str | None) -> list[str]:
    named = CORPORA.get(dataset)
    if named is not None:
        return _hub_files(dataset, named) if dataset_path is None else _local_files(dataset, named, dataset_path)
    if dataset_path is not None:
        raise UserError(
            f"dataset_path is '{dataset_path}', but dataset '{dataset}' is no named corpus; "
            f"name the folder itself as dataset, or one of: {', '.join(CORPORA)}"
        )
    return parquet_files(dataset)


def _hub_files(name: str, named: NamedCorpus) -> list[str]:
    try:
        files = _named_files(f"hf://datasets/{named.hub_id}", named)
        reason = "no such files"
    except Exception as error:  # the hub's client raises what its transports raise
        files, reason = [], (str(error).strip().splitlines() or [type(error).__name__])[0]
    if not files:
        raise UserError(
            f"the corpus '{name}' could not be opened on the hub ({reason}); download it with "
            f"`hf download {named.hub_id} --repo-type dataset --local-dir FOLDER` and set dataset_path to FOLDER"
        )
    return files


def _local_files(name: str, named: NamedCorpus, dataset_path: str) -> list[str]:
    files = _named_files(dataset_path, named)
    if not files:
        raise UserError(
            f"'{dataset_path}' holds no {named.config}/{named.split}-*.parquet of the corpus '{name}'; download it "
            f"with `hf download {named.hub_id} --repo-type dataset --local-dir {dataset_path}`"
        )
    return files


def _named_files(root: str, named: NamedCorpus) -> list[str]:
    for pattern in (f"{named.config}/{named.split}-*.parquet", f"{named.config}/{named.split}/*.parquet"):
        files = find_files(f"{root.rstrip('/')}/{pattern}", "*.parquet")
        if files:
            return files
    return []
