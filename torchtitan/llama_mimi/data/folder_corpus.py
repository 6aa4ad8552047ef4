"""Folders of audio files, with what stands beside them: ``metadata.csv``, LibriSpeech's transcripts, or JSON files."""

import csv
import io
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import pyarrow as pa

from llama_mimi.common.errors import UserError, first_line
from llama_mimi.common.files import digest, file_system, is_local, parse_json
from llama_mimi.data.corpus_files import open_beside
from llama_mimi.data.record_corpus import Record, RecordTable, groups_of_files

METADATA = ("metadata.csv", "metadata.jsonl")
TRANSCRIPTS = ".trans.txt"
Values = dict[str, Any]


class FolderCorpus:
    """Audio files at any depth, each a row. Values of a file come from these places, the first of which wins:

    - ``metadata.csv`` or ``metadata.jsonl`` in the file's folder or one above, with the column ``file_name``, as
      `datasets`' audiofolder has it;
    - ``*.trans.txt`` in its folder, with lines ``name TEXT``, as LibriSpeech; the speaker then begins the name;
    - a JSON file of its name, as Libri-Light and Emilia have it.

    Raises:
        UserError: metadata or transcripts are damaged, or those of the first files have no text.
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
        _, self._first_G, self.rows_per_group = groups_of_files([len(self.files)], name)
        self._root = _root(name, self.files)
        sizes = _sizes(self.files)
        folders = sorted({folder for file in self.files for folder in self._folders(file)})
        said = [[folder[len(self._root) :], _metadata(folder), _transcripts(folder)] for folder in folders]
        beside = _sizes([f"{file.rsplit('.', 1)[0]}.json" for file in self.files])
        names = [file[len(self._root) :] for file in self.files]
        self.fingerprint = digest([names, sizes, said, beside])
        self._has_json = any(size >= 0 for size in beside)
        stems = Counter(name.rsplit(".", 1)[0] for name in names)
        self._shared = {stem for stem, number in stems.items() if number > 1}
        first = map(self._record, self.files[: self.rows_per_group[0]])
        self._table = RecordTable(name, first, text_column, extra_columns)

    @property
    def columns(self) -> list[str]:
        return self._table.columns

    def row_name(self, group: int, row: int) -> str:
        return self.files[self._first_G[group] + row]

    def read_group(self, group: int) -> pa.Table:
        first = self._first_G[group]
        return self._table.table(
            [self._record(file) for file in self.files[first : first + self.rows_per_group[group]]]
        )

    def open_path(self, path: str, group: int) -> str | bytes:
        return open_beside(path, self.files[0])

    def _record(self, file: str) -> Record:
        name = file[len(self._root) :].lstrip("/")
        stem = name.rsplit(".", 1)[0]
        row_id = name if stem in self._shared else stem
        try:
            return Record(self._values(file), path=file, row_id=row_id)
        except (ValueError, OSError) as error:
            return Record({}, row_id=row_id, problem=f"what stands beside it cannot be read ({first_line(error)})")

    def _folders(self, file: str) -> list[str]:
        """The file's folder and those above it, as far as the corpus reaches."""
        folders = [file.rsplit("/", 1)[0]]
        while len(folders[-1]) > len(self._root):
            folders.append(folders[-1].rsplit("/", 1)[0])
        return folders

    def _values(self, file: str) -> Values:
        folder, name = file.rsplit("/", 1)
        stem = name.rsplit(".", 1)[0]
        values: Values = {}
        for above in self._folders(file):
            values = _metadata(above).get(file[len(above) + 1 :], {}) | values
        if (text := _transcripts(folder).get(stem)) is not None:
            values = {"speaker": stem.split("-")[0], "text": text} | values
        content = _read(f"{folder}/{stem}.json") if self._has_json else None
        said = {} if content is None else parse_json(content)
        if not isinstance(said, dict):
            raise ValueError(f"{stem}.json holds no JSON object")
        return said | values


def _root(name: str, files: Sequence[str]) -> str:
    """The folder of a corpus: what was named, or the literal part of a glob."""
    folders = [file.rsplit("/", 1)[0].split("/") for file in files]
    shared = 0
    while all(len(folder) > shared and folder[shared] == folders[0][shared] for folder in folders):
        shared += 1
    common = "/".join(folders[0][:shared])
    fs, bare = file_system(name)
    named = fs.unstrip_protocol(bare) if not is_local(fs) else bare
    named = named.rstrip("/")
    return named if fs.isdir(bare) and f"{common}/".startswith(f"{named}/") else common


def _sizes(files: Sequence[str]) -> list[int]:
    """Bytes of each file; -1 where there is none, as behind a link that leads nowhere."""
    fs, _ = file_system(files[0])
    found: list[int] = []
    for file in files:
        try:
            found.append(os.stat(file).st_size if is_local(fs) else fs.size(file_system(file)[1]))
        except OSError:
            found.append(-1)
    return found


@lru_cache(maxsize=64)
def _metadata(folder: str) -> dict[str, Values]:
    """Return values by the name of a file, relative to the folder."""
    found: dict[str, Values] = {}
    for name in METADATA:
        content = _read(f"{folder}/{name}")
        if content is None:
            continue
        try:
            text = content.decode("utf-8-sig")
            lines = csv.DictReader(io.StringIO(text)) if name.endswith("csv") else map(parse_json, _lines(text))
            for row in lines:
                found[row["file_name"]] = {k: v for k, v in row.items() if k not in ("file_name", None) and v != ""}
        except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
            what = f"{type(error).__name__}: {first_line(error)}"
            raise UserError(f"'{folder}/{name}' is no table with the column file_name ({what}); mend it") from error
    return found


@lru_cache(maxsize=64)
def _transcripts(folder: str) -> dict[str, str]:
    """Return texts by the names of files, of all ``*.trans.txt`` in a folder."""
    fs, bare = file_system(folder)
    texts: dict[str, str] = {}
    for path in sorted(path for path in fs.ls(bare, detail=False) if path.endswith(TRANSCRIPTS)):
        if path.rsplit("/", 1)[-1].startswith("."):
            continue
        try:
            lines = _lines(fs.cat_file(path).decode("utf-8-sig"))
        except ValueError as error:
            raise UserError(f"'{path}' is no text in UTF-8 ({first_line(error)}); mend it") from error
        for line in lines:
            name, _, text = line.partition(" ")
            texts[name] = text.strip()
    return texts


def _lines(text: str) -> list[str]:
    """Lines that hold something; only line feeds end them."""
    return [line.rstrip("\r") for line in text.split("\n") if line.strip()]


def _read(path: str) -> bytes | None:
    fs, bare = file_system(path)
    try:
        return fs.cat_file(bare)
    except (FileNotFoundError, NotADirectoryError):
        return None
