"""The pairs of SALMon, sLM21 and StoryCloze from folders in the official layouts.

Each reader also takes what `pair_tables` reads: a hub id, or a folder of Parquet files.
"""

import csv
import hashlib
import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from llama_mimi.audio.reading import AUDIO_ENDINGS
from llama_mimi.common.errors import UserError
from llama_mimi.common.files import is_hidden
from llama_mimi.evaluation.accuracy import frequency_band
from llama_mimi.evaluation.pair_tables import PairTable, open_tables

OTHER_AUDIO_ENDINGS = (".aac", ".aif", ".aiff", ".m4a", ".mp4", ".opus", ".sph", ".webm", ".wma")
# SALMon's own list (arXiv 2409.07437); its mean is that of these eight.
SALMON_PARTS = (
    "bg_alignment",
    "bg_all_consistency",
    "bg_domain_consistency",
    "gender_consistency",
    "rir_consistency",
    "sentiment_alignment",
    "sentiment_consistency",
    "speaker_consistency",
)
# Data sets of sLM21 and StoryCloze on the hub, and their parts. sWUGGY and sBLIMP are dev splits: the right answers of
# test are not published.
SLM21_TABLES = {"sWUGGY": "lexical_dev", "sBLIMP": "syntactic_dev"}
STORYCLOZE_TABLES = ("sStoryCloze", "tStoryCloze")


@dataclass(frozen=True)
class BenchmarkClip:
    """A clip to be scored.

    Args:
        name: in the result file, and in messages.
        source: a file, or a place in a table.
        split: of sLM21 ("lexical/dev"), whose submission file lists the clip.
    """

    name: str
    source: Path | PairTable.Cell
    split: str | None = None

    def read(self) -> bytes:
        """The bytes of the audio file.

        Raises:
            UserError: there are none, or they cannot be read.
        """
        try:
            return self.source.read_bytes()
        except OSError as error:
            raise UserError(f"'{self.source}' cannot be read ({error.strerror}); mend that or copy it anew") from error


@dataclass(frozen=True)
class Pair:
    """A model is right where ``positive`` is likelier than ``negative``.

    Args:
        part: of the benchmark.
        name: within the part.
        group: pairs of one part and group are averaged first by preset "official": the voices of a word.
        labels: what accuracy is also given by, such as {"type": "anaphor_agreement"}.
    """

    part: str
    name: str
    positive: BenchmarkClip
    negative: BenchmarkClip
    group: str
    labels: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True)
class Benchmark:
    """What a source holds.

    Args:
        pairs: to be judged.
        unpaired: clips whose right answers are not published (sLM21's test split), scored for the submission alone.
        notes: what must be known of the source, such as what it holds and no preset scores, one sentence each.
    """

    pairs: list[Pair]
    unpaired: list[BenchmarkClip] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def clips(self) -> list[BenchmarkClip]:
        """Every clip, pair by pair."""
        return [clip for pair in self.pairs for clip in (pair.positive, pair.negative)] + self.unpaired


def limited(benchmark: Benchmark, limit: int) -> Benchmark:
    """A part of a benchmark for a quick look: so many groups of each part, drawn by the hash of their names.

    A smaller limit draws a part of what a larger one draws. Clips whose right answers are not published are left out.
    """
    groups: dict[str, set[str]] = defaultdict(set)
    for pair in benchmark.pairs:
        groups[pair.part].add(pair.group)
    chosen = {
        (part, group)
        for part, names in groups.items()
        for group in sorted(names, key=lambda name: hashlib.sha256(f"{part}/{name}".encode()).digest())[:limit]
    }
    pairs = [pair for pair in benchmark.pairs if (pair.part, pair.group) in chosen]
    note = f"only {len(pairs):,} of {len(benchmark.pairs):,} pairs were scored, by --limit {limit}"
    return Benchmark(pairs, notes=[*benchmark.notes, note])


def read_salmon(source: str) -> Benchmark:
    """SALMon: ``<root>/<part>/sample_<index>_<k>.wav``, or tables of the eight parts.

    Files of an index are sorted; the first is the positive and each other one a negative. Parts named ``all`` or
    ``all_*`` repeat pairs of the others and are left out.

    Raises:
        UserError: no pairs, or files that belong to none.
    """
    pairs: list[Pair] = []
    notes: list[str] = []
    if tables := _tables(source, None, ("positive_audio", "negative_audio")):
        for table in tables:
            if _is_aggregate(table.name):
                notes.append(_repeats(table.name))
                continue
            pairs += [
                Pair(_salmon_part(table, row), str(index), *_table_clips(table, index), group=str(index))
                for index, row in enumerate(table.rows())
            ]
    else:
        for folder in _folders(Path(source)):
            if _is_aggregate(folder.name):
                notes.append(_repeats(folder.name))
            else:
                pairs += _samples(folder)
    return Benchmark(_not_empty(pairs, source, "<part>/sample_<index>_<k>.wav"), notes=notes)


def read_slm21(source: str) -> Benchmark:
    """sLM21: ``lexical`` (sWUGGY) and ``syntactic`` (sBLIMP) with ``{dev,test}/*.wav`` and ``gold.csv``, or tables.

    Lexical pairs join on (id, voice) and their group is the id; syntactic pairs are consecutive rows and their group is
    (type, subtype, id). A test split without ``gold.csv``, as it is published, is scored for the submission alone.

    Raises:
        UserError: no pairs, or files that ``gold.csv`` does not list.
    """
    pairs: list[Pair] = []
    unpaired: list[BenchmarkClip] = []
    notes: list[str] = []
    if tables := _tables(source, SLM21_TABLES, ("positive", "negative")):
        for table in tables:
            rows = list(table.rows())
            has_ids = all(row.get("id") is not None for row in rows)
            if not has_ids:
                notes.append(
                    f"'{table.name}' has no column 'id': its rows are counted one by one, not by word or sentence"
                )
            for index, row in enumerate(rows):
                group = "_".join(str(row.get(key)) for key in ("type", "subtype", "id")) if has_ids else str(index)
                clips = _table_clips(table, index)
                pairs.append(Pair(SLM21_TABLES[table.name], str(index), *clips, group, _labels(row, table.name)))
        return Benchmark(_not_empty(pairs, source, "a table of pairs"), notes=notes)
    for folder in sorted(path for path in Path(source).glob("*/*/") if not _is_hidden(path, source)):
        task, split = folder.parent.name, folder.name
        if task in ("phonetic", "semantic"):
            notes.append(f"'{folder}' belongs to other tasks of ZeroSpeech 2021 and is left out")
            continue
        if task not in ("lexical", "syntactic"):
            raise UserError(f"'{folder}' belongs to neither lexical nor syntactic; move the odd folder out")
        files: dict[str, BenchmarkClip] = {}
        for path in _audio_files(folder):
            if path.stem in files:
                raise UserError(f"'{path}' and '{files[path.stem].name}' have one name; move the odd file out")
            files[path.stem] = BenchmarkClip(path.name, path, f"{task}/{split}")
        if (folder / "gold.csv").is_file():
            pairs += _gold_pairs(folder / "gold.csv", f"{task}_{split}", files)
        elif split == "test":
            unpaired += files.values()
            notes.append(f"'{folder}' has no gold.csv: its {len(files):,} clips are scored for the submission alone")
        else:
            raise UserError(f"'{folder}' has no gold.csv, which says what is right; add it or move the folder out")
    if not unpaired:
        _not_empty(pairs, source, "{lexical,syntactic}/{dev,test}/gold.csv")
    return Benchmark(pairs, unpaired, notes)


def read_storycloze(source: str) -> Benchmark:
    """StoryCloze: a flat folder sorted by integer prefix, consecutive files being positive and negative, or tables.

    A folder of such folders has one part each: sStoryCloze (its own wrong ending) and tStoryCloze (a random ending).

    Raises:
        UserError: no pairs, or files that belong to none.
    """
    pairs: list[Pair]
    if tables := _tables(source, STORYCLOZE_TABLES, ("positive", "negative")):
        pairs = [
            Pair(table.name, str(index), *_table_clips(table, index), group=str(index))
            for table in tables
            for index in range(len(table))
        ]
        return Benchmark(_not_empty(pairs, source, "a table of pairs"))
    root = Path(source)
    folders = [folder for folder in _folders(root) if _audio_files(folder)]
    if folders and (odd := _audio_files(root)):
        raise UserError(f"'{odd[0]}' lies beside folders of stories; move the odd file out, or name one folder")
    notes: list[str] = []
    pairs = [pair for folder in folders or [root] for pair in _stories(folder, notes)]
    return Benchmark(_not_empty(pairs, source, "<number>_*.wav"), notes=notes)


def _samples(folder: Path) -> Iterator[Pair]:
    """Pairs of one part of SALMon."""
    groups: dict[int, list[Path]] = defaultdict(list)
    for path in _audio_files(folder):
        match = re.fullmatch(r"sample_(\d+)_(\d+)", path.stem)
        if match is None:
            raise UserError(f"'{path}' is not named sample_<index>_<k>; move the odd file out")
        groups[int(match[1])].append(path)
    for index, paths in sorted(groups.items()):
        if len(paths) < 2:
            raise UserError(f"'{paths[0]}' has no counterpart of the same index; add it or move the odd file out")
        by_number = {int(path.stem.rsplit("_", 1)[1]): path for path in paths}
        if len(by_number) < len(paths):
            raise UserError(f"'{folder}' has two files of the same name for index {index}; move the odd file out")
        positive, *negatives = [BenchmarkClip(path.name, path) for _, path in sorted(by_number.items())]
        for negative in negatives:
            yield Pair(folder.name, str(index), positive, negative, group=negative.name)


def _stories(folder: Path, notes: list[str]) -> list[Pair]:
    numbered: dict[int, Path] = {}
    for path in _audio_files(folder):
        match = re.match(r"(\d+)", path.stem)
        if match is None:
            raise UserError(f"'{path}' does not begin with a number; move the odd file out")
        if int(match[1]) in numbered:
            raise UserError(f"'{path}' and '{numbered[int(match[1])]}' have the same number; move the odd file out")
        numbered[int(match[1])] = path
    numbers = sorted(numbered)
    if len(numbers) % 2:
        last = numbered[numbers[-1]]
        raise UserError(f"'{folder}' holds {len(numbers)} files, an odd number; the last one, '{last}', has no partner")
    pairs = list(zip(numbers[::2], numbers[1::2], strict=True))
    apart = [(numbered[first].name, numbered[second].name) for first, second in pairs if second != first + 1]
    if apart:
        notes.append(
            f"'{folder}': the numbers of {len(apart):,} of {len(pairs):,} pairs do not follow each other, as in "
            f"'{apart[0][0]}' and '{apart[0][1]}'; make sure that no file is missing"
        )
    clips = {number: BenchmarkClip(path.name, path) for number, path in numbered.items()}
    part = folder.resolve().name
    return [Pair(part, numbered[a].stem, clips[a], clips[b], group=numbered[a].stem) for a, b in pairs]


def _gold_pairs(gold: Path, part: str, files: Mapping[str, BenchmarkClip]) -> Iterator[Pair]:
    try:
        with gold.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"'{gold}' cannot be read ({error}); save it as UTF-8 or copy it anew") from error
    keys = {"filename", "id", "voice", "correct"}
    if not rows or not keys <= rows[0].keys():
        raise UserError(f"'{gold}' needs rows with the columns {', '.join(sorted(keys))}")
    if short := [number for number, row in enumerate(rows, 2) if None in row.values()]:
        raise UserError(f"'{gold}' has too few cells in line {short[0]}; copy it anew")
    listed = {_stem(row["filename"]) for row in rows}
    if len(listed) < len(rows):
        raise UserError(f"'{gold}' lists {len(rows)} files, but only {len(listed)} names; copy it anew")
    if odd := sorted(files.keys() - listed):
        raise UserError(f"'{files[odd[0]].source}' is not listed in '{gold}'; move the odd file out")
    if missing := sorted(listed - files.keys()):
        raise UserError(f"'{gold}' lists '{missing[0]}', but there is no such audio file beside it")
    is_lexical = part.startswith("lexical")
    for first, second in _by_id_and_voice(rows, gold) if is_lexical else _consecutive(rows, gold):
        if {first["correct"], second["correct"]} != {"0", "1"}:
            raise UserError(f"'{gold}': '{first['filename']}' and '{second['filename']}' need one correct each")
        right, wrong = (first, second) if first["correct"] == "1" else (second, first)
        yield Pair(
            part,
            f"{right['id']}_{right['voice']}",
            files[_stem(right["filename"])],
            files[_stem(wrong["filename"])],
            group=right["id"] if is_lexical else "_".join(right.get(key, "") for key in ("type", "subtype", "id")),
            labels=_labels(right, str(gold)),
        )


def _by_id_and_voice(rows: list[dict[str, str]], gold: Path) -> Iterator[tuple[dict[str, str], dict[str, str]]]:
    groups: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        groups[row["id"], row["voice"]].append(row)
    for (word_id, voice), group in groups.items():
        if len(group) != 2:
            raise UserError(
                f"'{gold}' has {len(group)} rows of id {word_id} and voice {voice}, not a word and a non-word"
            )
        yield group[0], group[1]


def _consecutive(rows: list[dict[str, str]], gold: Path) -> Iterator[tuple[dict[str, str], dict[str, str]]]:
    if len(rows) % 2:
        raise UserError(f"'{gold}' has {len(rows)} rows, an odd number; pairs are consecutive rows")
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        if (first["id"], first["voice"]) != (second["id"], second["voice"]):
            names = f"'{first['filename']}' and '{second['filename']}'"
            raise UserError(f"'{gold}': {names} follow each other, but differ in id or voice; sort it as published")
        yield first, second


def _labels(row: Mapping[str, object], where: str) -> dict[str, str]:
    """Labels of a pair, from the row of its right clip."""
    labels = {key: str(row[key]) for key in ("type", "subtype") if row.get(key) not in (None, "")}
    try:
        given = row.get("frequency")
        frequency = math.nan if given in (None, "") else float(str(given))
        if not math.isnan(frequency):  # a word without one is in no band, as in the official tool
            labels["frequency"] = frequency_band(frequency)
    except ValueError as error:
        raise UserError(f"'{where}' has the frequency '{row['frequency']}', which is no count; copy it anew") from error
    return labels


def _tables(source: str, names: Collection[str] | None, columns: tuple[str, str]) -> list[PairTable]:
    """Tables of pairs; none where a folder holds audio files, whatever else lies in it."""
    root = Path(source)
    files = root.rglob("*") if root.is_dir() else ()
    if any(path.suffix.lower() in AUDIO_ENDINGS and not _is_hidden(path, root) for path in files):
        return []
    return open_tables(source, names, {*SLM21_TABLES, *STORYCLOZE_TABLES}, columns)


def _salmon_part(table: PairTable, row: Mapping[str, object]) -> str:
    """The folder or configuration, unless one table holds several parts."""
    task = str(row.get("task"))
    return task if table.name not in SALMON_PARTS and task in SALMON_PARTS else table.name


def _is_aggregate(part: str) -> bool:
    return part == "all" or part.startswith("all_")


def _repeats(part: str) -> str:
    return f"the part '{part}' repeats pairs of the others and is left out"


def _table_clips(table: PairTable, index: int) -> tuple[BenchmarkClip, BenchmarkClip]:
    positive, negative = (BenchmarkClip(f"{table.name}_{index}_{cell.column}", cell) for cell in table.cells(index))
    return positive, negative


def _stem(filename: str) -> str:
    return Path(filename).stem if filename.lower().endswith(AUDIO_ENDINGS) else filename


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not is_hidden(f"{path.name}/"))


def _audio_files(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.iterdir() if path.is_file() and not is_hidden(path.name))
    if other := [path for path in files if path.suffix.lower() in OTHER_AUDIO_ENDINGS]:
        raise UserError(f"'{other[0]}' is no {', '.join(AUDIO_ENDINGS)} file; convert it, or move it out")
    return [path for path in files if path.suffix.lower() in AUDIO_ENDINGS]


def _is_hidden(path: Path, root: Path | str) -> bool:
    return is_hidden(path.relative_to(root).as_posix())


def _not_empty(pairs: list[Pair], source: str, layout: str) -> list[Pair]:
    if not pairs:
        raise UserError(
            f"'{source}' holds no pairs; the official layout is {layout} (any of {', '.join(AUDIO_ENDINGS)}), and "
            "Parquet files are read, too"
        )
    return pairs
