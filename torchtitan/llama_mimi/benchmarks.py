"""The pairs of SALMon, sLM21 and StoryCloze, from the official folder layouts or the hub."""

import csv
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from datasets import Audio, get_dataset_config_names, load_dataset

from llama_mimi.errors import UserError

AUDIO_ENDINGS = (".wav", ".flac", ".ogg", ".mp3")


@dataclass(frozen=True)
class BenchmarkClip:
    """A clip to be scored: its name, and a path or the bytes of a file."""

    name: str
    source: Path | bytes


@dataclass(frozen=True)
class Pair:
    """A model is right where ``positive`` is likelier than ``negative``."""

    part: str
    name: str
    positive: BenchmarkClip
    negative: BenchmarkClip


def salmon_pairs(source: str) -> list[Pair]:
    """SALMon: ``<root>/<part>/sample_<index>_<k>.wav``, or the hub data set.

    Files of an index are sorted; the first is the positive and each other one a negative. Parts named ``all`` or
    ``all_*`` on the hub repeat the others and are left out.
    """
    root = Path(source)
    if not root.is_dir():
        parts = [part for part in _hub_configs(source) if part != "all" and not part.startswith("all_")]
        return [pair for part in parts for pair in _hub_pairs(source, part, part, "positive_audio", "negative_audio")]
    pairs = []
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
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
            positive, *negatives = [path for _, path in sorted(by_number.items())]
            pairs += [_file_pair(folder.name, str(index), positive, negative) for negative in negatives]
    return _not_empty(pairs, source, "<part>/sample_<index>_<k>.wav")


def slm21_pairs(source: str) -> list[Pair]:
    """sLM21: ``lexical`` (sWUGGY) and ``syntactic`` (sBLIMP) with ``{dev,test}/*.wav`` and ``gold.csv``, or the hub.

    Lexical pairs join on (id, voice); syntactic pairs are consecutive rows.
    """
    root = Path(source)
    if not root.is_dir():
        parts = {"lexical": f"{source}/sWUGGY", "syntactic": f"{source}/sBLIMP"}
        return [pair for part, hub_id in parts.items() for pair in _hub_pairs(hub_id, None, part)]
    pairs: list[Pair] = []
    for split_folder in sorted(root.glob("*/*/")):
        gold = split_folder / "gold.csv"
        if not gold.is_file():
            raise UserError(
                f"'{split_folder}' has no gold.csv, which says what is right; add it or move the folder out"
            )
        part = gold.parent.parent.name
        if part not in ("lexical", "syntactic"):
            raise UserError(f"'{gold}' belongs to neither lexical nor syntactic; move the odd folder out")
        split = f"{part}_{gold.parent.name}"
        with gold.open(newline="") as file:
            rows = list(csv.DictReader(file))
        keys = {"filename", "id", "voice", "correct"}
        if not rows or not keys <= rows[0].keys():
            raise UserError(f"'{gold}' needs rows with the columns {', '.join(sorted(keys))}")
        files = {path.stem: path for path in _audio_files(gold.parent)}
        listed = {_stem(row["filename"]) for row in rows}
        if odd := sorted(files.keys() - listed):
            raise UserError(f"'{files[odd[0]]}' is not listed in '{gold}'; move the odd file out")
        if missing := sorted(listed - files.keys()):
            raise UserError(f"'{gold}' lists '{missing[0]}', but there is no such audio file beside it")
        for first, second in _gold_rows(part, rows, gold):
            if {first["correct"], second["correct"]} != {"0", "1"}:
                raise UserError(f"'{gold}': '{first['filename']}' and '{second['filename']}' need one correct each")
            right, wrong = (first, second) if first["correct"] == "1" else (second, first)
            name = f"{first['id']}_{first['voice']}"
            pairs.append(_file_pair(split, name, files[_stem(right["filename"])], files[_stem(wrong["filename"])]))
    return _not_empty(pairs, source, "{lexical,syntactic}/{dev,test}/gold.csv")


def storycloze_pairs(source: str) -> list[Pair]:
    """StoryCloze: a flat folder sorted by integer prefix, consecutive files being positive and negative, or the hub.

    On the hub ``source`` is the owner of sStoryCloze (its own wrong ending) and tStoryCloze (a random ending).
    """
    root = Path(source)
    if not root.is_dir():
        parts = ("sStoryCloze", "tStoryCloze")
        return [pair for part in parts for pair in _hub_pairs(f"{source}/{part}", None, part)]
    numbered: dict[int, Path] = {}
    for path in _audio_files(root):
        match = re.match(r"(\d+)", path.stem)
        if match is None:
            raise UserError(f"'{path}' does not begin with a number; move the odd file out")
        if int(match[1]) in numbered:
            raise UserError(f"'{path}' and '{numbered[int(match[1])]}' have the same number; move the odd file out")
        numbered[int(match[1])] = path
    paths = [path for _, path in sorted(numbered.items())]
    if len(paths) % 2:
        raise UserError(
            f"'{root}' holds {len(paths)} files, an odd number; the last one, '{paths[-1]}', has no partner"
        )
    pairs = [
        _file_pair(root.name, positive.stem, positive, negative)
        for positive, negative in zip(paths[::2], paths[1::2], strict=True)
    ]
    return _not_empty(pairs, source, "<number>_*.wav")


def _gold_rows(part: str, rows: list[dict[str, str]], gold: Path) -> Iterator[tuple[dict[str, str], dict[str, str]]]:
    if part == "syntactic":
        if len(rows) % 2:
            raise UserError(f"'{gold}' has {len(rows)} rows, an odd number; pairs are consecutive rows")
        yield from zip(rows[::2], rows[1::2], strict=True)
        return
    groups: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        groups[row["id"], row["voice"]].append(row)
    for (word_id, voice), group in groups.items():
        if len(group) != 2:
            raise UserError(
                f"'{gold}' has {len(group)} rows of id {word_id} and voice {voice}, not a word and a non-word"
            )
        yield group[0], group[1]


def _stem(filename: str) -> str:
    return Path(filename).stem if filename.lower().endswith(AUDIO_ENDINGS) else filename


def _audio_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in AUDIO_ENDINGS)


def _file_pair(part: str, name: str, positive: Path, negative: Path) -> Pair:
    return Pair(part, name, BenchmarkClip(positive.name, positive), BenchmarkClip(negative.name, negative))


def _not_empty(pairs: list[Pair], source: str, layout: str) -> list[Pair]:
    if not pairs:
        raise UserError(
            f"'{source}' holds no pairs; the official layout is {layout} (any of {', '.join(AUDIO_ENDINGS)})"
        )
    return pairs


def _hub_configs(hub_id: str) -> list[str]:
    try:
        return get_dataset_config_names(hub_id)
    except (OSError, ValueError) as error:
        raise _hub_error(hub_id, error) from error


def _hub_pairs(
    hub_id: str, config: str | None, part: str, positive: str = "positive", negative: str = "negative"
) -> Iterable[Pair]:
    try:
        rows = load_dataset(hub_id, config, split="train")
    except (OSError, ValueError) as error:
        raise _hub_error(hub_id, error) from error
    for column in (positive, negative):
        rows = rows.cast_column(column, Audio(decode=False))
    for index, row in enumerate(rows):
        clips = [BenchmarkClip(f"{part}_{index}_{column}", row[column]["bytes"]) for column in (positive, negative)]
        yield Pair(part, str(index), *clips)


def _hub_error(hub_id: str, error: Exception) -> UserError:
    return UserError(
        f"'{hub_id}' is neither a folder nor a data set that could be opened on the hub "
        f"({str(error).strip().splitlines()[0]}); download it and give its folder with --data_dir"
    )
