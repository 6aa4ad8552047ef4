"""JSONL manifests, as NeMo has them: lines with ``audio_filepath``, ``offset``, ``duration``, ``text``."""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from llama_mimi.common.errors import UserError, first_line
from llama_mimi.common.files import digest, file_system, parse_json
from llama_mimi.data.corpus_files import open_beside
from llama_mimi.data.record_corpus import ROWS_PER_GROUP, Record, RecordTable, groups_of_files, seconds_of

AUDIO_KEY = "audio_filepath"


class ManifestCorpus:
    """Lines of JSON that name audio files or parts of them, relative to the manifest; blank lines do not count.

    Audio is looked for under ``audio_filepath`` where there is no ``audio_column``.

    Raises:
        UserError: a manifest cannot be read, or its first line has no audio.
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
        scanned = [_scan(file) for file in self.files]
        self._starts = [starts for starts, _, _ in scanned]  # of the first line of each group
        self._file_G, self._first_G, self.rows_per_group = groups_of_files([rows for _, rows, _ in scanned], name)
        self.fingerprint = digest([sha256 for _, _, sha256 in scanned])
        first = [self._values(line) for line in self._lines(0)]
        columns = {str(key) for values in first if values for key in values}
        self._audio_key = audio_column if audio_column in columns else AUDIO_KEY
        if self._audio_key not in columns:
            raise UserError(
                f"'{self.files[self._file_G[0]]}' has neither '{audio_column}' nor '{AUDIO_KEY}' in its first "
                f"{ROWS_PER_GROUP} lines, only {', '.join(sorted(columns)) or 'no JSON objects'}; say where audio "
                "files are named (data.audio_column, or --audio_column of a script)"
            )
        self._table = RecordTable(name, map(self._record, self._lines(0)), text_column, extra_columns)

    @property
    def columns(self) -> list[str]:
        return self._table.columns

    def row_name(self, group: int, row: int) -> str:
        return f"row {self._first_G[group] + row} of {self.files[self._file_G[group]]}"

    def read_group(self, group: int) -> pa.Table:
        return self._table.table([self._record(line) for line in self._lines(group)])

    def open_path(self, path: str, group: int) -> str | bytes:
        return open_beside(path, self.files[self._file_G[group]])

    def _lines(self, group: int) -> list[bytes]:
        file = self._file_G[group]
        fs, bare = file_system(self.files[file])
        starts, first = self._starts[file], self._first_G[group] // ROWS_PER_GROUP
        try:
            content = fs.read_block(bare, int(starts[first]), int(starts[first + 1] - starts[first]))
        except OSError as error:
            raise _unreadable(self.files[file], error) from error
        return [line for line in content.split(b"\n") if line.strip()]

    @staticmethod
    def _values(line: bytes) -> dict | None:
        try:
            values = parse_json(line)
        except ValueError:
            return None
        return values if isinstance(values, dict) else None

    def _record(self, line: bytes) -> Record:
        values = self._values(line)
        if values is None:
            return Record({}, problem="its line is not a JSON object")
        try:
            path = values.get(self._audio_key)
            offset, duration = seconds_of(values.get("offset")), seconds_of(values.get("duration"))
            row_id = values.get("id")
            if row_id is None and path is not None and (offset or duration is not None):
                row_id = f"{path}@{offset or 0:g}"  # parts of one recording
            return Record(
                values,
                path=None if path is None else str(path),
                row_id=None if row_id is None else str(row_id),
                offset=offset,
                duration=duration,
            )
        except (ValueError, TypeError, OverflowError) as error:
            return Record({}, problem=f"its offset or duration is none ({first_line(error)})")


def _scan(file: str) -> tuple[np.ndarray, int, str]:
    """Where each group of lines begins, and the end; how many lines there are; and a hash of all."""
    fs, bare = file_system(file)
    starts, rows, offset, sha256 = [0], 0, 0, hashlib.sha256()
    try:
        with fs.open(bare, "rb") as stream:
            for line in stream:
                sha256.update(line)
                offset += len(line)
                rows += bool(line.strip())
                if line.strip() and rows % ROWS_PER_GROUP == 0:
                    starts.append(offset)
    except OSError as error:
        raise _unreadable(file, error) from error
    return np.array([*starts, offset] if rows % ROWS_PER_GROUP else starts), rows, sha256.hexdigest()


def _unreadable(file: str, error: Exception) -> UserError:
    return UserError(f"the manifest '{file}' cannot be read ({first_line(error)}); check it, or copy it anew")
