"""Folders of audio files. Texts are in tables, in transcript files in LibriSpeech's format, or in JSON files."""

import csv
import io
import os
import posixpath
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate

from llama_mimi.common.command_line import is_first_rank
from llama_mimi.common.errors import UserError, first_line
from llama_mimi.common.files import as_utf8, digest, file_system, is_local, parse_json
from llama_mimi.corpora.source import ROWS_PER_UNIT, Columns, Row, Source, Unit, Values, parse_object, slices

TABLES, TRANSCRIPTS = ("metadata.csv", "metadata.jsonl"), ".trans.txt"


class FolderSource(Source):
    """Source for a folder. Each audio file, at any depth, is a row. A row's values come from these files, by priority:

    - a table in the file's folder or in a parent folder: ``metadata.csv`` or ``metadata.jsonl`` with a column
      ``file_name`` (audiofolder of `datasets`), ``metadata.csv`` with lines ``id|text|normalized_text`` next to the
      folder ``wavs`` (LJSpeech), or ``*.trans.txt`` with lines ``name TEXT`` (LibriSpeech);
    - a JSON file with the name of the audio file, such as ``clip.json`` for ``clip.flac`` (Libri-Light, Emilia).
    """

    def __init__(self, name: str, files: Sequence[str], wanted: Columns) -> None:
        super().__init__(name, wanted)
        fs, bare = file_system(name)
        named = (bare if is_local(fs) else fs.unstrip_protocol(bare)).rstrip("/")
        root = named if fs.isdir(bare) else os.path.commonprefix(files).rpartition("/")[0]  # noqa: RUF071
        self._files, names = files, [file[len(root) + 1 :] for file in files]
        stems = [name.rsplit(".", 1)[0] for name in names]
        count = Counter(stems)
        self._ids = [as_utf8(name if count[stem] > 1 else stem) for name, stem in zip(names, stems, strict=True)]
        sizes: dict[str, int] = {}  # bytes of every file, by its path below the root
        tables: dict[str, Values] = {}  # entries by the path of an audio file, with or without its ending
        folders = {posixpath.dirname(name) for name in names} - {""}
        above = {path for folder in folders for path in accumulate(folder.split("/"), "{}/{}".format)}
        for folder in ["", *sorted(above)]:
            path = os.path.join(root, folder)
            fs, bare = file_system(path)
            found = {posixpath.basename(info["name"]): info["size"] or 0 for info in fs.ls(bare, detail=True)}
            sizes |= {posixpath.join(folder, name): size for name, size in found.items()}
            for key, values in _read_tables(path, sorted(found)).items():
                key = _key(posixpath.join(folder, key))
                tables[key] = tables.get(key, {}) | values
        self._entries = self._match(names, tables)
        audio_sizes = [sizes.get(name, -1) for name in names]
        self._json_sizes = [sizes.get(f"{stem}.json", -1) for stem in stems]
        self.fingerprint = digest([names, audio_sizes, tables, self._json_sizes])
        self.units = [Unit(sum(audio_sizes[start:end]), end - start) for start, end in slices(len(files))]
        known = [*self._entries, *map(self._values, range(*slices(len(files))[0]))]
        self._choose_columns(key for values in known if isinstance(values, dict) for key in values)

    def rows(self, unit: int, start: int = 0) -> Iterator[Row]:
        first = unit * ROWS_PER_UNIT
        for index in range(first + start, min(first + ROWS_PER_UNIT, len(self._files))):
            yield self._row("", self._values(index), self._files[index], self._ids[index])

    def _values(self, index: int) -> Values | str:
        if self._json_sizes[index] < 0:
            return self._entries[index]
        fs, bare = file_system(f"{self._files[index].rsplit('.', 1)[0]}.json")
        try:
            values = parse_object(fs.cat_file(bare))
        except OSError as error:
            return f"its JSON cannot be read ({first_line(error)})"
        return values if isinstance(values, str) else values | self._entries[index]

    def _match(self, names: Sequence[str], tables: dict[str, Values]) -> list[Values]:
        """Return the table entry of each file. Print how many files lack an entry, and how many entries lack a file."""
        keys = [(key.rsplit(".", 1)[0], key) for key in map(_key, names)]
        found = [tables.get(stem, {}) | tables.get(key, {}) for stem, key in keys]
        missing = [as_utf8(name) for name, entry in zip(names, found, strict=True) if not entry]
        unused = sorted(tables.keys() - {key for pair in keys for key in pair})
        if tables and (missing or unused):
            examples = ", ".join(missing[:1] + unused[:1])
            if len(unused) == len(tables):
                problem = f"the file names in the tables of '{self.name}' do not match its audio files ({examples})"
                raise UserError(f"{problem}; correct the file names in the tables")
            if is_first_rank():
                counts = f"{len(missing):,} audio files lack a row, and {len(unused):,} rows lack an audio file"
                print(f"in the tables of '{self.name}', {counts} (such as {examples})", flush=True)
        return found


def _key(name: str) -> str:
    return posixpath.normpath(unicodedata.normalize("NFC", name.replace("\\", "/")))


def _read_tables(folder: str, names: Sequence[str]) -> dict[str, Values]:
    """Return the entries of a folder's tables. Each key is the name of an audio file, with or without its ending."""
    found: dict[str, Values] = {}
    for name in names:
        if name in TABLES or (name.endswith(TRANSCRIPTS) and not name.startswith(".")):
            path = os.path.join(folder, name)
            fs, bare = file_system(path)
            try:
                for file, values in _read_table(name, fs.cat_file(bare).decode("utf-8-sig")):
                    if (key := _key(file)) in found:
                        raise ValueError(f"two rows are for '{file}'")
                    found[key] = values
            except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
                problem = f"{type(error).__name__}: {first_line(error)}"
                needed = "in UTF-8" if name.endswith(TRANSCRIPTS) else "with the column file_name"
                raise UserError(f"'{path}' is not a table {needed} ({problem}); correct this file") from error
    return found


def _read_table(name: str, text: str) -> Iterator[tuple[str, Values]]:
    lines = [line.rstrip("\r") for line in text.split("\n") if line.strip()]
    if name.endswith(TRANSCRIPTS):
        for line in lines:
            stem, _, words = line.partition(" ")
            yield stem, {"speaker": stem.split("-")[0], "text": words.strip()}
    elif name.endswith("csv") and lines and "|" in lines[0] and "file_name" not in lines[0]:
        for line in lines:
            stem, *texts = line.split("|")
            yield f"wavs/{stem}", dict(zip(("text", "normalized_text"), texts, strict=False))
    else:
        for row in csv.DictReader(io.StringIO(text), strict=True) if name.endswith("csv") else map(parse_json, lines):
            file = row.pop("file_name")
            if any(row.pop(None, ())):
                raise ValueError(f"the line for '{file}' has more fields than the header")
            yield file, {key: value for key, value in row.items() if value != ""}
