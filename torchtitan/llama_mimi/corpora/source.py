"""Interface of all corpus formats: rows with undecoded audio, their columns, and splits."""

import json
import os
import re
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa

from llama_mimi.audio.reading import AUDIO_ENDINGS
from llama_mimi.common.errors import UserError, first_line
from llama_mimi.common.files import parse_json
from llama_mimi.corpora.where import ROLE

ROWS_PER_UNIT = 100  # in formats without row groups; `datasets` also writes 100 rows of audio to a row group
# Endings of audio in corpora; the last four need FFmpeg.
CORPUS_ENDINGS = (*AUDIO_ENDINGS, ".oga", ".opus", ".aiff", ".aif", ".au", ".m4a", ".aac", ".webm", ".wma")

# Words in file names that mark a split on the hub (huggingface.co/docs/hub/datasets-file-names-and-splits).
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
# Unlike the hub, this pattern ignores case and accepts "=" before a word, for Hive's folders (split=train).
_SPLIT_WORD = re.compile(rf"(?:^|[-._= 0-9])({'|'.join(SPLIT_WORDS)})(?=[-._= 0-9]|$)")
_SPLIT_OF_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}\S*\.\w+")

# Keys of a row: "name" (id, path or position) and "audio" (bytes of a file, an absolute path, an fsspec URL, or None).
# Optional keys: "id", "text", "speaker", "offset" and "duration" (in seconds, if the row is a part of a recording),
# "problem" (the reason why the row cannot be used), and one key for each column in a filter expression.
Row = dict[str, Any]
Values = dict[str, Any]
HUB = "hf:"  # prefix of a dataset id on the hub


class Unit(NamedTuple):
    """Consecutive rows that are read together: a tar file, a Parquet row group, or 100 files, lines or rows."""

    num_bytes: int
    num_rows: int | None  # None for a tar file, whose rows are counted while it is read
    place: tuple[Any, ...] = ()  # position of the rows in the source's files


@dataclass(frozen=True)
class Columns:
    """Column names for audio ("": not read), for text (None: not read), and for optional roles such as "speaker"."""

    audio: str
    text: str | None
    extra: Mapping[str, str]


class Source(ABC):
    """Base class of the corpus formats."""

    units: Sequence[Unit]
    fingerprint: str  # hash of the content, compared on resume

    def __init__(self, name: str, wanted: Columns) -> None:
        self.name, self._wanted = name, wanted
        self._columns: dict[str, str] = {}  # column of each role

    @property
    def columns(self) -> list[str]:
        """Keys of every row, except "name" and "problem"."""
        return ["audio", *(role for role in self._columns if role not in ("audio", "id"))]

    @abstractmethod
    def rows(self, unit: int, start: int = 0) -> Iterator[Row]:
        """Yield the rows of a unit in order, beginning with row ``start``; raise a `UserError` for a damaged file."""

    def _choose_columns(self, found: Iterable[str], required: Sequence[str] = ("text",), place: str = "") -> None:
        """For each role, choose a column from ``found``; raise a `UserError` if a required column is missing."""
        columns, extra = list(dict.fromkeys(found)), {"id": "id", **self._wanted.extra}
        self._columns = {role: column for role, column in extra.items() if column in columns}
        for role in required:
            if (column := getattr(self._wanted, role)) in columns:
                self._columns[role] = column
            elif column:
                where, others = place or f"the dataset '{self.name}'", ", ".join(columns) or "none"
                problem = f"{where} lacks the column '{column}' for the {role} (columns: {others})"
                raise UserError(f"{problem}; set data.{role}_column (or a script's --{role}_column) to another column")

    def _row(self, place: str, values: Values | str, audio: Any, row_id: Any, folder: str = "", **part: Any) -> Row:
        """Return a row.

        Args:
            place: name for the row if the row has neither an id nor a path.
            values: values by column, or a sentence with the reason why the values cannot be read.
            audio: bytes, a path, an object with bytes and a path, or None; a path is relative to ``folder``.
            part: values for the keys "offset", "duration" or "problem".
        """
        if not isinstance(audio, Mapping):
            audio = {"bytes" if isinstance(audio, bytes) else "path": audio}
        content, path, name = audio.get("bytes"), audio.get("path"), _label(row_id)
        row: Row = {"name": name or _label(path) or place, "id": name, "audio": content, **part}
        for value, kind, wanted in ((content, bytes, "the bytes of a file"), (path, str, "a path")):
            if value and not isinstance(value, kind):
                values = f"its audio is a {type(value).__name__}, not {wanted}"
        if isinstance(values, str):
            return row | {"problem": values}
        if not content and path:
            row["audio"] = path if "://" in path else os.path.join(folder, path)
        try:
            for role in self.columns[1:]:
                value = values.get(self._columns[role])
                value = None if value != value else value  # pandas writes NaN for missing values
                row[role] = value if value is None or role.startswith(ROLE) else _text(value, role)
        except (ValueError, TypeError) as error:
            row["problem"] = f"its {role} cannot be stored ({first_line(error)})"
        return row


@contextmanager
def reading(path: str, kind: str) -> Iterator[None]:
    """Turn an error in the ``with`` block into a `UserError` that names the file and the expected ``kind``."""
    try:
        yield
    except (OSError, ValueError, KeyError, tarfile.TarError, pa.ArrowException) as error:
        problem = f"'{path}' is not a readable {kind} ({first_line(error)})"
        raise UserError(f"{problem}; write or copy the file again") from error


def slices(count: int) -> list[tuple[int, int]]:
    """Divide ``count`` files or rows into units; return the start and the end of each unit."""
    return [(start, min(start + ROWS_PER_UNIT, count)) for start in range(0, count, ROWS_PER_UNIT)]


def parse_object(content: bytes) -> Values | str:
    """Parse a JSON object; if parsing fails, return the reason as a sentence."""
    try:
        values = parse_json(content)
    except ValueError as error:
        return f"its JSON cannot be read ({first_line(error)})"
    return values if isinstance(values, dict) else "its JSON is not an object"


def _text(value: Any, role: str) -> str:
    """Return a value as text; raise an error for invalid UTF-8, and for a list or an object if the role is "text"."""
    if role == "text" and isinstance(value, list | dict):
        raise TypeError(f"it is a {type(value).__name__}")
    text = value if isinstance(value, str | bytes) else json.dumps(value, ensure_ascii=False, default=str)
    return (text.encode() if isinstance(text, str) else text).decode()


def _label(value: Any) -> str | None:
    if value is None:
        return None
    content = value if isinstance(value, bytes) else str(value).encode(errors="backslashreplace")
    return content.decode(errors="backslashreplace")


def choose_split(name: str, splits: Iterable[str | None], split: str | None) -> str | None:
    """Return the split to read, or None for all files; raise a `UserError` if the user must choose another split."""
    found = list(dict.fromkeys(filter(None, splits)))
    if split is None and len(found) > 1:
        remedy = "set data.split, data.validation_split or a script's --split to one of them, or choose files by a glob"
        raise UserError(f"'{name}' contains the splits {', '.join(found)}; {remedy}")
    chosen = split if split is None or split in found else SPLIT_WORDS.get(split, split)
    if chosen is not None and chosen not in found:
        has = f"the splits {', '.join(found)}" if found else "files without splits"
        remedy = "set one of these splits" if found else "remove the setting, such as data.split"
        raise UserError(f"the split '{split}' does not exist: '{name}' contains {has}; {remedy}")
    return chosen


def splits_in(folder: str, files: Sequence[str]) -> list[str | None]:
    """Return the split of each file according to the hub's rules, or None for a file without a split.

    The name of a split is taken from a file ``data/<split>-00000-of-00001.parquet``, or from one of `SPLIT_WORDS` in
    the name of a subfolder, or in the file name. The first rule that applies to any file is used for all files.
    """
    below = [file[len(folder.rstrip("/")) + 1 :].split("/") for file in files]
    shards = [_SPLIT_OF_SHARD.fullmatch(parts[-1]) if parts[:-1] == ["data"] else None for parts in below]
    by_shard = [match[1] if match else None for match in shards]
    by_folder = [next(filter(None, map(_split_word, reversed(parts[:-1]))), None) for parts in below]
    by_name = [_split_word(parts[-1]) for parts in below]
    return next((rule for rule in (by_shard, by_folder, by_name) if any(rule)), by_name)


def _split_word(name: str) -> str | None:
    match = _SPLIT_WORD.search(name.lower())
    return SPLIT_WORDS[match[1]] if match else None
