"""JSONL manifests in NeMo's format: lines with ``audio_filepath``, ``offset``, ``duration`` and ``text``."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from llama_mimi.common.errors import UserError, first_line
from llama_mimi.common.files import digest, file_system
from llama_mimi.corpora.source import ROWS_PER_UNIT, Columns, Row, Source, Unit, Values, parse_object, reading, slices

AUDIO_KEY = "audio_filepath"


class ManifestSource(Source):
    """Source for JSON lines. A unit has 100 lines. Each line names an audio file, or a part of an audio file.

    Paths are relative to the manifest. The path is the value of the audio column, or else of ``audio_filepath``. This
    value may also be an object with a path, as `datasets` writes it. Blank lines are ignored.
    """

    def __init__(self, name: str, files: Sequence[str], wanted: Columns) -> None:
        super().__init__(name, wanted)
        self.units: list[Unit] = []  # place: file, first line, offset in bytes
        self.fingerprint = digest([self._scan(file) for file in files])
        if not self.units:
            raise UserError(f"the dataset '{name}' has no rows; choose another dataset")
        found = map(self._parse, self._lines(0))
        keys = dict.fromkeys(str(key) for values in found if isinstance(values, dict) for key in values)
        self._audio_key = wanted.audio if wanted.audio in keys else AUDIO_KEY
        self._choose_columns(keys, ("text",) if self._audio_key in keys else ("audio", "text"))

    def rows(self, unit: int, start: int = 0) -> Iterator[Row]:
        file, first, _ = self.units[unit].place
        for number, line in enumerate(self._lines(unit)[start:], first + start):
            values, part, audio, row_id = self._parse(line), {}, None, None
            if isinstance(values, dict):
                audio, row_id = values.get(self._audio_key), values.get("id")
                try:
                    part = {key: _seconds(values.get(key)) for key in ("offset", "duration")}
                    if row_id is None and isinstance(audio, str) and (part["offset"] or part["duration"] is not None):
                        row_id = f"{audio}@{part['offset'] or 0:g}"  # a part of a recording
                except (ValueError, TypeError, OverflowError) as error:
                    values = f"its offset or duration is wrong ({first_line(error)})"
            yield self._row(f"row {number} of {file}", values, audio, row_id, file.rsplit("/", 1)[0], **part)

    def _scan(self, file: str) -> str:
        """Append the units of a manifest to ``units``, and return the hash of the manifest."""
        starts, num_rows, offset, sha256 = [], 0, 0, hashlib.sha256()
        fs, bare = file_system(file)
        with reading(file, "manifest"), fs.open(bare, "rb") as stream:
            for line in stream:
                if line.strip():
                    if num_rows % ROWS_PER_UNIT == 0:
                        starts.append(offset)
                    num_rows += 1
                offset += len(line)
                sha256.update(line)
        for (first, last), (start, end) in zip(slices(num_rows), pairwise([*starts, offset]), strict=True):
            self.units.append(Unit(end - start, last - first, (file, first, start)))
        return sha256.hexdigest()

    def _parse(self, line: bytes) -> Values | str:
        return parse_object(line)

    def _lines(self, unit: int) -> list[bytes]:
        file, _, start = self.units[unit].place
        fs, bare = file_system(file)
        with reading(file, "manifest"):
            content = fs.read_block(bare, start, self.units[unit].num_bytes)
        return [line for line in content.split(b"\n") if line.strip()]


class LineSource(ManifestSource):
    """Source for text files: each line is a row with only a text. Blank lines are ignored."""

    def _parse(self, line: bytes) -> Values | str:
        return {str(self._wanted.text): line.rstrip(b"\r")}


def _seconds(value: Any) -> float | None:
    if value is None or value != value:  # pandas writes NaN for missing values
        return None
    if not 0 <= (seconds := float(value)) < math.inf:
        raise ValueError(f"{value} is not a number of seconds")
    return seconds
