"""Folders of audio files, with what stands beside them: ``metadata.csv``, LibriSpeech's transcripts, or JSON files."""

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import pyarrow as pa

from llama_mimi.common.errors import UserError, first_line
from llama_mimi.common.files import digest, file_system, is_local
from llama_mimi.data.record_corpus import Record, RecordTable, groups_of_files

METADATA = ("metadata.csv", "metadata.jsonl")
TRANSCRIPTS = ".trans.txt"
Values = dict[str, Any]


class FolderCorpus:
    """Audio files at any depth, each a row. What is said about a file is looked for in this order, and joined:

    - ``metadata.csv`` or ``metadata.jsonl`` in the file's folder or one above, with the column ``file_name``, as
      `datasets`' audiofolder has it;
    - ``*.trans.txt`` in its folder, with lines ``name TEXT``, as LibriSpeech; the speaker then begins the name;
    - a JSON file of its name, as Libri-Light and Emilia have it.

    Args:
        name, files, audio_column, text_column, extra_columns: as `llama_mimi.data.corpora.open_corpus`;
            ``audio_column`` is of other formats.

    Raises:
        UserError: what stands beside the first file has no text.
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
        _, self._first_G, self.sizes_G = groups_of_files([len(self.files)], name)
        self._root = os.path.commonpath([os.path.dirname(file) for file in self.files])
        self.fingerprint = digest([[file[len(self._root) :], size] for file, size in _sizes(self.files)])
        self._table = RecordTable(name, list(self._values(self.files[0])), text_column, extra_columns)

    @property
    def columns(self) -> list[str]:
        return self._table.columns

    def row_name(self, group: int, row: int) -> str:
        return self.files[self._first_G[group] + row]

    def read_group(self, group: int) -> pa.Table:
        first = self._first_G[group]
        return self._table.table([self._record(file) for file in self.files[first : first + self.sizes_G[group]]])

    def open_path(self, path: str, group: int) -> str | bytes:
        fs, bare = file_system(path)
        return bare if is_local(fs) else fs.cat_file(bare)

    def _record(self, file: str) -> Record:
        row_id = os.path.splitext(file[len(self._root) :].lstrip("/"))[0]
        try:
            return Record(self._values(file), path=file, row_id=row_id)
        except (ValueError, OSError) as error:
            return Record({}, row_id=row_id, problem=f"what stands beside it cannot be read ({first_line(error)})")

    def _values(self, file: str) -> Values:
        folder, name = file.rsplit("/", 1)
        stem = name.rsplit(".", 1)[0]
        values: Values = {}
        above = folder
        while len(above) >= len(self._root):
            values = _metadata(above).get(file[len(above) + 1 :], {}) | values
            above = above.rsplit("/", 1)[0]
        if (text := _transcripts(folder).get(stem)) is not None:
            values = {"speaker": stem.split("-")[0], "text": text} | values
        beside = _read(f"{folder}/{stem}.json")
        said = {} if beside is None else json.loads(beside)
        if not isinstance(said, dict):
            raise ValueError(f"{stem}.json holds no JSON object")
        return said | values


def _sizes(files: Sequence[str]) -> list[tuple[str, int]]:
    fs, _ = file_system(files[0])
    if is_local(fs):
        return [(file, os.stat(file).st_size) for file in files]
    return [(file, fs.size(file)) for file in files]


@lru_cache(maxsize=64)
def _metadata(folder: str) -> dict[str, Values]:
    """Values by the name of a file, relative to the folder.

    Raises:
        UserError: the file is damaged.
    """
    found: dict[str, Values] = {}
    for name in METADATA:
        content = _read(f"{folder}/{name}")
        if content is None:
            continue
        try:
            text = content.decode()
            lines = csv.DictReader(io.StringIO(text)) if name.endswith("csv") else map(json.loads, text.splitlines())
            found |= {row["file_name"]: {k: v for k, v in row.items() if k != "file_name"} for row in lines}
        except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
            what = f"{type(error).__name__}: {first_line(error)}"
            raise UserError(f"'{folder}/{name}' is no table with the column file_name ({what}); mend it") from error
    return found


@lru_cache(maxsize=64)
def _transcripts(folder: str) -> dict[str, str]:
    """Texts by the names of files, of all ``*.trans.txt`` in a folder."""
    fs, bare = file_system(folder)
    texts: dict[str, str] = {}
    for path in sorted(path for path in fs.ls(bare, detail=False) if path.endswith(TRANSCRIPTS)):
        for line in fs.cat_file(path).decode().splitlines():
            name, _, text = line.partition(" ")
            texts[name] = text.strip()
    return texts


def _read(path: str) -> bytes | None:
    fs, bare = file_system(path)
    try:
        return fs.cat_file(bare)
    except (FileNotFoundError, NotADirectoryError):
        return None
