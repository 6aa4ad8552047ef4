"""What formats of corpora share: rows, whose audio stays undecoded, and splits."""

import json
import os
import re
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from llama_mimi.audio.reading import AUDIO_ENDINGS
from llama_mimi.common.errors import UserError, first_line
from llama_mimi.common.files import parse_json
from llama_mimi.corpora.where import ROLE

ROWS_PER_UNIT = 100  # of formats without row groups, as `datasets` writes audio to Parquet
# Endings of audio in corpora; the last four need FFmpeg.
CORPUS_ENDINGS = (*AUDIO_ENDINGS, ".oga", ".opus", ".aiff", ".aif", ".au", ".m4a", ".aac", ".webm", ".wma")

# Words that name a split, by the hub's rules (huggingface.co/docs/hub/datasets-file-names-and-splits).
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
# Beyond these rules capitals do not matter, and "=" stands between words, too: split=train is a folder of Hive.
_SPLIT_WORD = re.compile(rf"(?:^|[-._= 0-9])({'|'.join(SPLIT_WORDS)})(?=[-._= 0-9]|$)")
_SPLIT_OF_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}\S*\.\w+")

# A row has "name" (its id, else its path, else its place), and "audio": the bytes of an audio file, its path (absolute,
# or a URL of fsspec), or None. It may have "id", "text", "speaker", "offset" and "duration" (of a part of a recording,
# in seconds), "problem" (why it cannot be used), and the columns that a filter names.
Row = dict[str, Any]
Values = dict[str, Any]
HUB = "hf:"  # before an id of any dataset on the hub


@dataclass(frozen=True)
class Unit:
    """Rows that are read together and in order: a tar file, a Parquet row group, or a slice of files, lines or rows."""

    num_bytes: int
    num_rows: int | None  # None: known only after reading, as of a tar file


@dataclass(frozen=True)
class Columns:
    """Names of the columns of audio and text (None: rows have no text), and of other roles where they exist."""

    audio: str
    text: str | None
    extra: Mapping[str, str]


class Source(ABC):
    """A corpus in one of the formats."""

    units: Sequence[Unit]
    fingerprint: str  # equal for corpora of equal content

    def __init__(self, name: str, wanted: Columns) -> None:
        self.name, self._wanted = name, wanted
        self._columns: dict[str, str] = {}  # by role

    @property
    def columns(self) -> list[str]:
        """Keys of all rows, except "name" and "problem"."""
        return ["audio", *(role for role in self._columns if role not in ("audio", "id"))]

    @abstractmethod
    def rows(self, unit: int, start: int = 0) -> Iterator[Row]:
        """Yield the rows of a unit in order, from number ``start`` on; raise a `UserError` if a file is damaged."""

    def _choose_columns(self, found: Iterable[str], required: Sequence[str] = ("text",), place: str = "") -> None:
        """Set the column of each role; raise a `UserError` if a required one is missing."""
        columns, extra = list(dict.fromkeys(found)), {"id": "id", **self._wanted.extra}
        self._columns = {role: column for role, column in extra.items() if column in columns}
        for role in required:
            if (column := getattr(self._wanted, role)) in columns:
                self._columns[role] = column
            elif column is not None:
                where, others = place or f"the dataset '{self.name}'", ", ".join(columns) or "none"
                problem = f"{where} has no column '{column}' for the {role}, only {others}"
                raise UserError(f"{problem}; set another (data.{role}_column, or --{role}_column of a script)")

    def _row(self, place: str, values: Values | str, audio: Any, row_id: Any, folder: str = "", **part: Any) -> Row:
        """Return a row of values by column, or of the sentence why they cannot be read.

        Args:
            place: name of a row that has neither an id nor a path.
            audio: bytes, a path, an object with both, or None; relative paths start in ``folder``.
            part: offset, duration or problem.
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
                value = None if value != value else value  # NaN, as pandas writes missing values
                row[role] = value if value is None or role.startswith(ROLE) else _text(value, role)
        except (ValueError, TypeError) as error:
            row["problem"] = f"its {role} cannot be stored ({first_line(error)})"
        return row


@contextmanager
def reading(path: str, kind: str) -> Iterator[None]:
    """Raise a `UserError` that names the file if it is damaged; ``kind`` is what it should be."""
    try:
        yield
    except (OSError, ValueError, KeyError, tarfile.TarError, pa.ArrowException) as error:
        problem = f"'{path}' is not a readable {kind} ({first_line(error)})"
        raise UserError(f"{problem}; fix the cause, or copy it again") from error


def slices(count: int) -> list[tuple[int, int]]:
    """Return start and end of each unit of so many files or rows."""
    return [(start, min(start + ROWS_PER_UNIT, count)) for start in range(0, count, ROWS_PER_UNIT)]


def parse_object(content: bytes) -> Values | str:
    """Return a JSON object, or the sentence why it is not one."""
    try:
        values = parse_json(content)
    except ValueError as error:
        return f"its JSON cannot be read ({first_line(error)})"
    return values if isinstance(values, dict) else "its JSON is not an object"


def _text(value: Any, role: str) -> str:
    """Return a value as text; raise an error for bytes that are not UTF-8, half a character, and a text of parts."""
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
    """Return the split to read, or None for all files; raise a `UserError` if it does not exist or is not named."""
    found = list(dict.fromkeys(filter(None, splits)))
    if split is None and len(found) > 1:
        remedy = "choose one (data.split, data.validation_split, or --split of a script), or name its files by a glob"
        raise UserError(f"'{name}' contains the splits {', '.join(found)}; {remedy}")
    chosen = split if split is None or split in found else SPLIT_WORDS.get(split, split)
    if chosen is not None and chosen not in found:
        contained = f"'{name}' contains {', '.join(found) or 'no splits'}"
        raise UserError(f"the split '{split}' was asked for, but {contained}; choose another, or leave it out")
    return chosen


def splits_in(folder: str, files: Sequence[str]) -> list[str | None]:
    """Return the split of each file, by the hub's rules; None if its path names none.

    Files are called ``data/<split>-00000-of-00001.parquet``, or have one of `SPLIT_WORDS` between other characters than
    letters in the name of a folder below ``folder``, or in their own; the first rule that a file meets applies to all.
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
