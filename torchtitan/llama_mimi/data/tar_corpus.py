"""WebDataset: tar files whose members of one key are a row, such as ``a.mp3`` and ``a.json``, Emilia's layout.

Where members lie is found out once for each tar, by its headers, and kept in a folder of the hub's cache (``HF_HOME``):
then any row is one read, and a million rows are there in seconds.
"""

import hashlib
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import SEEK_END
from pathlib import Path
from typing import Any

import pyarrow as pa
from huggingface_hub.constants import HF_HOME
from tqdm import tqdm

from llama_mimi.common.errors import UserError, first_line
from llama_mimi.common.files import digest, file_system, parse_json, write_atomically
from llama_mimi.data.corpus_files import CORPUS_ENDINGS
from llama_mimi.data.record_corpus import Record, RecordTable, groups_of_files

INDEX_THREADS = 16
FORMAT = 2
# Of a row: its key, and where the bytes of audio, JSON and text lie; a size of -1 is a member that is not there.
MEMBERS = ("audio", "json", "txt")
SCHEMA = pa.schema(
    [("key", pa.string()), *((f"{part}_{what}", pa.int64()) for part in MEMBERS for what in ("start", "size"))]
)


class TarCorpus:
    """Rows of uncompressed tar files; the text may be a ``.txt`` member, too.

    Raises:
        UserError: a tar is damaged or compressed, holds a member twice or no audio, or its first row has no text.
    """

    def __init__(
        self,
        name: str,
        files: Sequence[str],
        audio_column: str,
        text_column: str | None,
        extra_columns: Mapping[str, str],
    ) -> None:
        self.name, self.files, self._text_column = name, tuple(files), text_column
        is_known = all(_index_path(file).is_file() for file in self.files)
        with ThreadPoolExecutor(INDEX_THREADS) as pool:  # a remote one is mostly waiting
            found = pool.map(_index, self.files)
            self._indexes = list(tqdm(found, "index", len(self.files), unit="tar", disable=is_known))
        self._file_G, self._first_G, self.rows_per_group = groups_of_files(
            [len(index) for index in self._indexes], name
        )
        self.fingerprint = digest([[file.rsplit("/", 1)[-1], _hash(index)] for file, index in self._by_file()])
        self._table = RecordTable(name, self._records(0, int(self.rows_per_group[0])), text_column, extra_columns)

    @property
    def columns(self) -> list[str]:
        return self._table.columns

    def row_name(self, group: int, row: int) -> str:
        key = self._indexes[self._file_G[group]]["key"][int(self._first_G[group] + row)]
        return f"'{key}' of {self.files[self._file_G[group]]}"

    def read_group(self, group: int) -> pa.Table:
        return self._table.table(list(self._records(group, int(self.rows_per_group[group]))))

    def _by_file(self) -> Iterator[tuple[str, pa.Table]]:
        return zip(self.files, self._indexes, strict=True)

    def open_path(self, path: str, group: int) -> str | bytes:
        raise OSError("members of a tar have no path")

    def _records(self, group: int, count: int) -> Iterator[Record]:
        file = self.files[self._file_G[group]]
        rows = self._indexes[self._file_G[group]].slice(int(self._first_G[group]), count).to_pylist()
        fs, bare = file_system(file)
        try:
            with fs.open(bare, "rb") as stream:
                for row in rows:
                    yield _record(stream, row)
        except OSError as error:
            raise _unreadable(file, error) from error


def _record(stream: Any, row: Mapping[str, Any]) -> Record:
    parts = {}
    for part in MEMBERS:
        if row[f"{part}_size"] >= 0:
            stream.seek(row[f"{part}_start"])
            parts[part] = stream.read(row[f"{part}_size"])
    try:
        values = parse_json(parts.get("json", b"{}"))
        if not isinstance(values, dict):
            raise ValueError("no object")
        if "txt" in parts:
            values = {"text": parts["txt"].decode().strip()} | values
        row_id = values.get("id", values.get("_id"))
        return Record(values, content=parts.get("audio"), row_id=row["key"] if row_id is None else str(row_id))
    except ValueError as error:
        return Record({}, row_id=row["key"], problem=f"its JSON or text cannot be read ({first_line(error)})")


def _index(file: str) -> pa.Table:
    """Where the rows of a tar lie, from what is kept, or from its headers, which are then kept."""
    path = _index_path(file)
    if not path.is_file():
        table = pa.Table.from_pylist(_rows(file), SCHEMA)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, SCHEMA) as writer:
            writer.write_table(table)
        try:
            write_atomically(str(path.parent), path.name, sink.getvalue().to_pybytes())
        except UserError as error:
            print(f"the index of '{file}' is made at each start, as it cannot be kept: {error}", flush=True)
            return table
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all()


def _index_path(file: str) -> Path:
    """Where the index of a tar is kept; another tar of the same name has another."""
    return Path(HF_HOME) / "llama_mimi" / "tar_index" / f"{digest([FORMAT, file, _size(file), _changed(file)])}.arrow"


def _rows(file: str) -> list[dict[str, Any]]:
    """Return rows by key, in the order of the tar; a key without audio is a row, too."""
    fs, bare = file_system(file)
    rows: dict[str, dict[str, Any]] = {}
    places: dict[str, tuple[int, int]] = {}  # of files that hard links may name
    try:
        with fs.open(bare, "rb") as stream:
            size = stream.seek(0, SEEK_END)
            stream.seek(0)
            with tarfile.open(fileobj=stream, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # it keeps all that it has seen
                    if member.offset_data + member.size > size:
                        raise tarfile.ReadError("it ends within a member")
                    if member.islnk():
                        _enter(rows, member.name, *places[member.linkname], file)
                    elif member.isfile():
                        places[member.name] = member.offset_data, member.size
                        _enter(rows, member.name, *places[member.name], file)
                # tarfile takes any damage behind the first header for the end, which is zeros to the last byte.
                stream.seek(tar.offset)
                if not rows or size - tar.offset < tarfile.BLOCKSIZE or stream.read().strip(b"\0"):
                    raise tarfile.ReadError("it holds no files, or ends without an end")
    except (OSError, KeyError, tarfile.TarError) as error:
        raise _unreadable(file, error) from error
    return list(rows.values())


def _enter(rows: dict[str, dict[str, Any]], path: str, start: int, size: int, file: str) -> None:
    folder, slash, name = path.rpartition("/")
    ending = name.lower().rpartition(".")[2]
    part = "audio" if f".{ending}" in CORPUS_ENDINGS else ending
    if part not in MEMBERS or name.startswith("."):  # of others, or hidden, as macOS leaves them
        return
    key = f"{folder}{slash}{name.rpartition('.')[0]}"
    row = rows.setdefault(key, {"key": key} | {f"{p}_{w}": -1 for p in MEMBERS for w in ("start", "size")})
    if row[f"{part}_size"] >= 0:
        raise UserError(f"'{file}' holds '{path}' twice, or two files of audio of that name; write it anew")
    row[f"{part}_start"], row[f"{part}_size"] = start, size


def _hash(index: pa.Table) -> str:
    """Of keys and places: tars of other clips have others, though their sizes may be the same."""
    sha256 = hashlib.sha256()
    for column in index.columns:
        sha256.update(json.dumps(column.to_pylist()).encode())
    return sha256.hexdigest()


def _size(file: str) -> int:
    fs, bare = file_system(file)
    return fs.size(bare)


def _changed(file: str) -> str:
    fs, bare = file_system(file)
    info = fs.info(bare)
    return str(info.get("mtime") or info.get("ETag") or info.get("LastModified") or "")


def _unreadable(file: str, error: Exception) -> UserError:
    return UserError(
        f"'{file}' is no whole tar file that is not compressed ({first_line(error)}); copy it anew, or unpack a .gz"
    )
