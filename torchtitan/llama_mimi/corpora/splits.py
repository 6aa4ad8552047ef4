"""Splits of a corpus, by the names of files and folders."""

import re
from collections.abc import Iterable, Sequence

from llama_mimi.common.errors import UserError

# Words that name a split, by the hub's rules (huggingface.co/docs/hub/datasets-file-names-and-splits).
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
# Beyond these rules capitals do not matter, and "=" stands between words, too: split=train is a folder of Hive.
_SPLIT_WORD = re.compile(rf"(?:^|[-._= 0-9])({'|'.join(SPLIT_WORDS)})(?=[-._= 0-9]|$)")
_SPLIT_OF_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}\S*\.\w+")


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
