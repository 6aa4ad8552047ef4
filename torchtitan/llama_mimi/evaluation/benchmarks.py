"""Read the pairs of SALMon, sLM21, StoryCloze and ProsAudit from the official folders, Parquet files or the hub."""

import csv
import hashlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets import Audio, Dataset, get_dataset_config_names, load_dataset

from llama_mimi.audio.reading import AUDIO_ENDINGS
from llama_mimi.common.errors import UserError, first_line
from llama_mimi.common.files import find_files, is_hidden, visible_files

ENDINGS = (*AUDIO_ENDINGS, ".aac", ".aif", ".aiff", ".m4a", ".mp4", ".opus", ".sph", ".webm", ".wma")
SALMON_PARTS = (
    "bg_alignment bg_all_consistency bg_domain_consistency gender_consistency "
    "rir_consistency sentiment_alignment sentiment_consistency speaker_consistency"
).split()
# Data sets on the hub, and names of their parts. sWUGGY and sBLIMP are dev splits: the test answers are secret.
SLM21_TABLES = {"sWUGGY": "lexical_dev", "sBLIMP": "syntactic_dev"}
STORYCLOZE_TABLES = ("sStoryCloze", "tStoryCloze")
# (lowest count in LibriSpeech, label) for each band, copied from sLM21's tool. The tool's labels are off by one: the
# band "6-20" includes words with a count of 5.
FREQUENCY_BANDS = ((0, "oov"), (1, "1-5"), (5, "6-20"), (20, "21-100"), (100, ">100"))


@dataclass(frozen=True)
class Cell:
    """Audio in one cell (row and column) of a table."""

    dataset: Dataset
    index: int
    column: str

    def read_bytes(self) -> bytes:
        audio = self.dataset[self.index][self.column]
        if audio is None or audio["bytes"] is None:
            raise UserError(f"row {self.index} lacks audio bytes in the column '{self.column}'; add the audio bytes")
        return audio["bytes"]


@dataclass(frozen=True)
class Clip:
    """A clip to score. For sLM21 and ProsAudit, ``split`` is the submission file's name, such as "lexical/dev"."""

    name: str
    source: Path | Cell
    split: str | None = None
    text: str = ""  # transcript, if known; for StoryCloze, the transcript of the ending
    prompt: str = ""  # for StoryCloze, the transcript before the ending
    prompt_seconds: float = math.nan  # for StoryCloze, time at which the ending begins, if known


@dataclass(frozen=True)
class Pair:
    """Two clips. A model is correct if it gives ``positive`` the higher score."""

    part: str
    name: str
    group: str  # such as a word; the preset "official" first averages the pairs (voices) of a group
    positive: Clip
    negative: Clip
    labels: Mapping[str, str] = field(default_factory=dict)  # more categories, such as {"type": "agreement"}
    speaker: str = ""  # speaker of both clips' beginning, if known; pairs of one speaker are not independent


@dataclass(frozen=True)
class Benchmark:
    """Pairs, unpaired clips and notes for the user. Clips of a test split with secret answers are unpaired."""

    pairs: list[Pair]
    unpaired: list[Clip] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def clips(self) -> list[Clip]:
        """All clips: first the positive and negative clip of each pair, then the unpaired clips."""
        return [clip for pair in self.pairs for clip in (pair.positive, pair.negative)] + self.unpaired


def limited(benchmark: Benchmark, limit: int) -> Benchmark:
    """Return a benchmark with at most ``limit`` groups in each part, chosen by a hash of the groups' names."""
    drawn: dict[str, set[str]] = defaultdict(set)
    groups = {(pair.part, pair.group) for pair in benchmark.pairs}
    for part, group in sorted(groups, key=lambda names: hashlib.sha256("/".join(names).encode()).digest()):
        if len(drawn[part]) < limit:
            drawn[part].add(group)
    pairs = [pair for pair in benchmark.pairs if pair.group in drawn[pair.part]]
    note = f"--limit {limit}: {len(pairs):,} of {len(benchmark.pairs):,} pairs were scored"
    return Benchmark(pairs, notes=[*benchmark.notes, note])


def read_salmon(source: str) -> Benchmark:
    """Read SALMon: files ``<part>/sample_<index>_<k>.wav``, or a table for each part.

    Among the files with the same index, the first is positive, and the others are negative. A part's folder may contain
    ``speakers.csv`` (columns index, speaker); the official folders do not. The parts ``all`` and ``all_*`` are skipped.
    """
    benchmark = _read_tables(source, ("positive_audio", "negative_audio"))
    for folder in (folder for folder in _folders(Path(source)) if folder.name.split("_")[0] != "all"):
        samples: dict[int, list[Clip]] = defaultdict(list)
        for (index, _), path in sorted(_files_by(folder, r"sample_(\d+)_(\d+)").items()):
            samples[index].append(Clip(path.name, path))
        for positive, *negatives in samples.values():
            if not negatives:
                problem = f"'{positive.source}' is the only file with its index"
                raise UserError(f"{problem}; add another file with this index, or remove the file")
        rows = _rows_by_key(folder / "speakers.csv", "index", ("speaker",), map(str, samples))
        speakers = {index: row["speaker"] for index, row in rows.items()}
        benchmark.pairs.extend(
            Pair(folder.name, str(index), clip.name, positive, clip, speaker=speakers.get(str(index), ""))
            for index, (positive, *negatives) in samples.items()
            for clip in negatives
        )
    return _not_empty(benchmark, source, "Parquet files or <part>/sample_<index>_<k>.wav files")


def _rows_by_key(path: Path, key: str, values: Sequence[str], names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return the row of each audio file in a table, by the column ``key``; {} if the table does not exist."""
    if not path.is_file():
        return {}
    rows = _csv_rows(path)
    listed = Counter(row[key] for row in rows if None not in row and all(row.get(name) for name in (key, *values)))
    expected = Counter(names)
    if odd := (listed - expected) | (expected - listed):
        problem = f"{key} '{min(odd)}' must have audio, and one row with its {' and '.join(values)} in '{path}'"
        raise UserError(f"{problem}; correct the table, or remove the table")
    return {row[key]: row for row in rows}


def read_slm21(source: str) -> Benchmark:
    """Read sLM21 from tables, or from folders ``{lexical,syntactic}/{dev,test}`` with audio and ``gold.csv``.

    The two rows of a lexical pair have the same id and voice; the group's name is the id. Two consecutive rows are a
    syntactic pair; the group's name consists of type, subtype and id. A test split without ``gold.csv`` is scored only
    for the submission. The transcript of a clip is in the column ``word`` or ``transcription``, as in the official
    tools (zerospeech/zerospeech2021 and zerospeech/benchmarks). The tools allow non-words without a spelling.
    """
    benchmark = _read_tables(source, ("positive", "negative"), SLM21_TABLES)
    names = {folder.name for folder in _folders(Path(source))}
    if names & {"lexical", "syntactic"} and (odd := names - {"lexical", "syntactic", "phonetic", "semantic"}):
        remedy = "rename it to lexical, syntactic, phonetic or semantic, or move it out of --data_dir"
        raise UserError(f"'{Path(source, min(odd))}' is not a folder of sLM21; {remedy}")
    for folder in (folder for task in ("lexical", "syntactic") for folder in _folders(Path(source, task))):
        task = folder.parent.name
        pair_columns = ("id", "voice") if task == "lexical" else ()
        _add_gold(benchmark, folder, f"{task}/{folder.name}", f"{task}_{folder.name}", pair_columns)
    return _not_empty(benchmark, source, "Parquet files or {lexical,syntactic}/{dev,test}/gold.csv")


def read_prosaudit(source: str) -> Benchmark:
    """Read ProsAudit (arXiv 2302.12057) from folders ``english/{dev,test}`` with audio and ``gold.csv``.

    The two clips of a pair are the same sentence with a pause at different places. In protosyntax pairs, the positive
    has its pause at a strong prosodic boundary, the negative at a weak boundary. In lexical pairs, the positive has its
    pause between two words, the negative within a word. A part is a subtask of a split, such as
    ``english_dev_lexical``. The two rows of a pair have the same type, id and voice; the group's name is the id.

    Columns, averaging, ties and submission files follow ZeroSpeech's toolkit (zerospeech-benchmarks 0.9.4). The toolkit
    forms pairs by the order of rows. Both methods agree if positives and negatives are listed in the same order; the
    published ``gold.csv`` was not available to check this order. The folder names are from other projects' scripts.
    """
    benchmark = Benchmark([])
    for folder in _folders(Path(source, "english")):
        split = f"english_{folder.name}"
        _add_gold(benchmark, folder, split, f"{split}_{{type}}", ("type", "id", "voice"))
    return _not_empty(benchmark, source, "english/{dev,test}/gold.csv")


def _add_gold(benchmark: Benchmark, folder: Path, split: str, part: str, pair_columns: Sequence[str]) -> None:
    """Add the clips of a folder to a benchmark: as pairs if the folder has ``gold.csv``, otherwise for the submission.

    Args:
        split: name of the submission file.
        part: name of the part; a column name in braces, such as {type}, is replaced by the pair's value.
        pair_columns: columns that identify a pair: only the two rows of a pair have the same values. If empty, two
            consecutive rows are a pair.
    """
    files = {stem: Clip(path.name, path, split) for (stem,), path in _files_by(folder, ".*").items()}
    if (folder / "gold.csv").is_file():
        benchmark.pairs.extend(_gold_pairs(folder / "gold.csv", part, pair_columns, files))
    elif folder.name == "test":
        benchmark.unpaired.extend(files.values())
        benchmark.notes.append(f"'{folder}' has no gold.csv: {len(files):,} clips are for the submission only")
    else:
        raise UserError(f"'{folder}' lacks gold.csv with the answers; add gold.csv, or remove the folder")


def _gold_pairs(gold: Path, part: str, pair_columns: Sequence[str], files: Mapping[str, Clip]) -> Iterator[Pair]:
    rows = _csv_rows(gold)
    keys = {"filename", "id", "voice", "correct", *pair_columns}
    if not rows or not keys <= rows[0].keys() or any(None in row.values() for row in rows):
        raise UserError(f"'{gold}' must have rows with the columns {', '.join(sorted(keys))}; download the file again")
    found: dict[Any, list[dict[str, str]]] = defaultdict(list)
    for index, row in enumerate(rows):
        if row["filename"].lower().endswith(ENDINGS):
            row["filename"] = Path(row["filename"]).stem
        found[tuple(row[column] for column in pair_columns) or index // 2].append(row)
    listed, present = Counter(row["filename"] for row in rows), Counter(files.keys())
    if odd := (listed - present) | (present - listed):
        raise UserError(f"'{min(odd)}' must have one row in '{gold}' and one audio file; download the benchmark again")
    for pair in found.values():
        places = {(row["id"], row["voice"]) for row in pair}
        if len(places) > 1 or sorted(row["correct"] for row in pair) != ["0", "1"]:
            names = "', '".join(row["filename"] for row in pair)
            problem = f"the rows '{names}' of '{gold}' must have the same id and voice"
            raise UserError(f"{problem}, and exactly one row must have 'correct' = 1; download the file again")
        wrong, right = sorted(pair, key=lambda row: row["correct"])
        group = right["id"] if pair_columns else "_".join(right.get(key, "") for key in ("type", "subtype", "id"))
        positive, negative = (
            replace(files[row["filename"]], text=row.get("transcription", row.get("word", "")))
            for row in (right, wrong)
        )
        labels = {key: label for key, label in _labels(right).items() if key not in pair_columns}
        yield Pair(part.format_map(right), f"{right['id']}_{right['voice']}", group, positive, negative, labels)


def _csv_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8-sig", errors="backslashreplace") as file:
        return list(csv.DictReader(file))


def _labels(row: Mapping[str, Any]) -> dict[str, str]:
    """Return a pair's labels; ``row`` belongs to the positive clip. Words without a frequency do not get a band."""
    labels = {key: str(row[key]) for key in ("type", "subtype") if row.get(key) not in (None, "")}
    try:
        frequency = float(row.get("frequency") or "nan")
    except ValueError as error:
        raise UserError(f"the frequency '{row['frequency']}' is not a count; download the benchmark again") from error
    bands = [band for lowest, band in FREQUENCY_BANDS if frequency >= lowest]
    return labels | ({"frequency": bands[-1]} if bands else {})


def read_storycloze(source: str) -> Benchmark:
    """Read StoryCloze: tables, or numbered files. Two consecutive files are a pair (positive, negative).

    If the files are in subfolders, such as sStoryCloze and tStoryCloze, each subfolder is a part. A folder may contain
    ``transcripts.csv``, a format of this project (columns file, prompt, ending and, if known, prompt_seconds).
    """
    benchmark = _read_tables(source, ("positive", "negative"), STORYCLOZE_TABLES)
    root = Path(source)
    folders = [folder for folder in _folders(root) if _audio_files(folder)]
    if folders and (odd := _audio_files(root)):
        remedy = "move the file into a subfolder, or set --data_dir to a subfolder"
        raise UserError(f"'{odd[0]}' is outside the subfolders; {remedy}")
    for folder in folders or [root]:
        files = sorted(_files_by(folder, r"(\d+).*").items())
        if len(files) % 2:
            problem = f"'{folder}' has an odd number of files (last: '{files[-1][1].name}')"
            raise UserError(f"{problem}; download the folder again")
        rows = _rows_by_key(folder / "transcripts.csv", "file", ("prompt", "ending"), [path.name for _, path in files])
        gaps = []
        for ((i,), a), ((j,), b) in zip(files[::2], files[1::2], strict=True):
            benchmark.pairs.append(
                Pair(folder.resolve().name, a.stem, a.stem, _story_clip(a, rows), _story_clip(b, rows))
            )
            gaps += [f"'{a.name}' and '{b.name}'"] if j != i + 1 else []
        if gaps:
            gap = f"{len(gaps):,} of {len(files) // 2:,} pairs do not have consecutive numbers, such as {gaps[0]}"
            benchmark.notes.append(f"'{folder}': {gap}; check that no file is missing")
    return _not_empty(benchmark, source, "Parquet files or <number>_*.wav files")


def _story_clip(path: Path, rows: Mapping[str, Mapping[str, str]]) -> Clip:
    """Return a clip with its transcript, if ``rows`` contains the transcript."""
    row = rows.get(path.name, {})
    seconds = row.get("prompt_seconds") or ""
    prompt_seconds = float(seconds) if re.fullmatch(r"\d+(\.\d+)?", seconds) else math.nan
    return Clip(path.name, path, None, row.get("ending", ""), row.get("prompt", ""), prompt_seconds)


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("*/") if not is_hidden(f"{path.name}/"))


def _audio_files(folder: Path) -> list[Path]:
    return [path for path in visible_files(folder, "*") if path.suffix.lower() in ENDINGS and path.is_file()]


def _files_by(folder: Path, pattern: str) -> dict[tuple[Any, ...], Path]:
    """Return a dict of audio files in a folder. Keys are the numbers that ``pattern`` captures, or the file's stem."""
    files: dict[tuple[Any, ...], Path] = {}
    for path in _audio_files(folder):
        if (match := re.fullmatch(pattern, path.stem)) is None:
            raise UserError(f"the name of '{path}' does not match '{pattern}'; rename or remove the file")
        key = tuple(map(int, match.groups())) or (path.stem,)
        if key in files:
            same = "number" if match.groups() else "name"
            raise UserError(f"'{path}' and '{files[key]}' have the same {same}; remove one of the two files")
        files[key] = path
    return files


def _not_empty(benchmark: Benchmark, source: str, layout: str) -> Benchmark:
    if not benchmark.clips:
        raise UserError(f"'{source}' does not contain pairs; set --data_dir to a folder with {layout}")
    return benchmark


def _read_tables(source: str, columns: tuple[str, str], names: Collection[str] | None = None) -> Benchmark:
    """Read a benchmark from tables with one pair in each row. If the folder contains audio files, the result is empty.

    ``source`` is a data set on the hub, an owner of data sets on the hub, or a downloaded folder (not renamed).
    ``names`` are the data sets of the benchmark; if None, each configuration of ``source`` is a part.
    """
    benchmark, root = Benchmark([]), Path(source)
    if (is_folder := root.is_dir()) and find_files(source, ENDINGS):
        return benchmark
    try:
        if names is None and is_folder:
            tables = {folder.name: [str(folder)] for folder in _folders(root)}
        elif names is None:
            tables = {part: [source, part] for part in get_dataset_config_names(source)}
        elif root.absolute().name in names:
            tables = {root.absolute().name: [source]}
        else:
            tables = {name: [f"{source}/{name}"] for name in names if not is_folder or (root / name).is_dir()}
        tables = {name: arguments for name, arguments in tables.items() if name.split("_")[0] != "all"}
        loaded = {name: load_dataset(*arguments, split="train") for name, arguments in tables.items()}
    except Exception as error:  # `datasets` passes on any error of its readers and of the network
        raise UserError(
            f"'{source}' is neither a folder in the official layout nor a data set on the hub ({first_line(error)}); "
            f"download the data again, and set --data_dir to the new folder"
        ) from error
    for name, dataset in loaded.items():
        _add_table(benchmark, name, dataset, columns)
    return benchmark


def _add_table(benchmark: Benchmark, name: str, dataset: Dataset, columns: tuple[str, str]) -> None:
    if not set(columns) <= set(dataset.column_names):
        found = ", ".join(dataset.column_names)
        raise UserError(f"'{name}' has the columns {found}; choose a data set with the columns {' and '.join(columns)}")
    audio = {column: dataset.select_columns([column]).cast_column(column, Audio(decode=False)) for column in columns}
    others = dataset.remove_columns(list(columns))
    rows = list(others) if others.column_names else [{}] * len(dataset)
    is_slm21 = name in SLM21_TABLES
    has_ids = is_slm21 and all(row.get("id") is not None for row in rows)
    if is_slm21 and not has_ids:
        benchmark.notes.append(f"'{name}' has no column 'id'; each row counts as one word or sentence")
    for index, row in enumerate(rows):
        right, wrong = (Clip(f"{name}_{index}_{column}", Cell(table, index, column)) for column, table in audio.items())
        group = "_".join(str(row.get(key)) for key in ("type", "subtype", "id")) if has_ids else str(index)
        labels = _labels(row) if is_slm21 else {}
        benchmark.pairs.append(Pair(SLM21_TABLES.get(name, name), str(index), group, right, wrong, labels))
