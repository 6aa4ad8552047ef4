"""WebDataset: uncompressed tar files. Members that differ only in their endings (``a.mp3``, ``a.json``) form a row."""

import os
import tarfile
from collections.abc import Collection, Iterator, Sequence
from itertools import groupby, islice
from operator import itemgetter
from typing import BinaryIO

from llama_mimi.common.errors import UserError, first_line
from llama_mimi.common.files import digest, file_system
from llama_mimi.corpora import source
from llama_mimi.corpora.source import Columns, Row, Source, Unit, Values

KIND = "tar file, or is compressed"
TEXTS = ("json", "txt")  # endings of members with labels; members with other endings are ignored
NO_AUDIO = "its audio file is missing; members of a row must have the same name, except for the last ending"


class TarSource(Source):
    """Source for tar files. A unit is a whole tar file, read from its beginning. A ``.txt`` member is the text."""

    def __init__(self, name: str, files: Sequence[str], wanted: Columns) -> None:
        super().__init__(name, wanted)
        self._files, self.units, contents = files, [], []
        for file in files:
            fs, bare = file_system(file)
            info = fs.info(bare)
            changed = str(info.get("mtime") or info.get("ETag") or info.get("LastModified") or "")
            with source.reading(file, KIND), fs.open(bare, "rb") as stream:
                # This check finds most incomplete downloads before work begins.
                _check_end(stream, max(0, info["size"] - tarfile.BLOCKSIZE))
            self.units.append(Unit(info["size"], None))
            contents.append([file.rsplit("/", 1)[-1], info["size"], changed])
        self.fingerprint = digest(contents)
        rows = (_values(parts) for unit in range(len(files)) for _, parts in self._members(unit, 0, TEXTS))
        if not (first := list(islice(rows, source.ROWS_PER_UNIT))):
            raise UserError(f"the dataset '{name}' has no rows; choose another dataset")
        self._choose_columns(key for values in first if isinstance(values, dict) for key in values)

    def rows(self, unit: int, start: int = 0) -> Iterator[Row]:
        for key, parts in self._members(unit, start, ("audio", *TEXTS)):
            values = _values(parts)
            row_id = None if isinstance(values, str) else values.get("id", values.get("_id"))
            problem = {} if "audio" in parts else {"problem": NO_AUDIO}
            yield self._row(key, values, parts.get("audio"), key if row_id is None else row_id, **problem)

    def _members(self, unit: int, start: int, wanted: Collection[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
        """Yield the key and the wanted members of each row, beginning with row ``start``; earlier rows are skipped."""
        file, seen = self._files[unit], set()
        fs, bare = file_system(file)
        with (
            source.reading(file, KIND),
            fs.open(bare, "rb") as stream,
            # Bytes that are not UTF-8 are escaped in names.
            tarfile.open(fileobj=stream, mode="r:", encoding="utf-8", errors="backslashreplace") as tar,
        ):
            for number, (key, members) in enumerate(groupby(filter(None, map(_part, tar)), itemgetter(0))):
                if key in seen:
                    raise UserError(f"in '{file}', the members of '{key}' are not adjacent; sort all members by name")
                seen.add(key)
                parts: dict[str, bytes] = {}
                for _, part, member in members:
                    if part in parts:
                        problem = f"'{file}' contains two {part} files with the name '{key}' (without the ending)"
                        raise UserError(f"{problem}; rename one of the two files")
                    is_wanted = number >= start and part in wanted
                    # extractfile follows links and restores sparse members.
                    content = tar.extractfile(member) if is_wanted else None
                    parts[part] = content.read() if content else b""
                if number >= start:
                    yield key, parts
            _check_end(stream, tar.offset)  # tarfile treats a damaged header, except the first, as the end


def _check_end(stream: BinaryIO, start: int) -> None:
    """Raise an error unless the rest of the file is an end-of-archive mark: one or more blocks of zeros."""
    size = stream.seek(0, os.SEEK_END) - stream.seek(start)
    if size < tarfile.BLOCKSIZE or any(block.strip(b"\0") for block in iter(lambda: stream.read(2**20), b"")):
        raise tarfile.ReadError("its end-of-archive mark is missing")


def _part(member: tarfile.TarInfo) -> tuple[str, str, tarfile.TarInfo] | None:
    """Return (key, part, member), or None for folders, hidden files, and files that are neither audio nor `TEXTS`."""
    stem, _, ending = member.name.rpartition(".")
    part = "audio" if f".{ending.lower()}" in source.CORPUS_ENDINGS else ending.lower()
    is_file = member.isfile() or member.islnk() or member.issym()
    is_hidden = member.name.rpartition("/")[2].startswith(".")
    return (stem, part, member) if is_file and part in ("audio", *TEXTS) and not is_hidden else None


def _values(parts: dict[str, bytes]) -> Values | str:
    values = source.parse_object(parts.get("json", b"{}"))
    try:
        text = {"text": parts["txt"].decode("utf-8-sig").strip()} if "txt" in parts else {}
    except ValueError as error:
        return f"its text is not UTF-8 ({first_line(error)})"
    return values if isinstance(values, str) else text | values
