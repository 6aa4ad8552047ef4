"""Benchmarks as tables of pairs: data sets on the hub, and their Parquet files in a folder."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from datasets import Audio, Dataset, get_dataset_config_names, load_dataset
from datasets.exceptions import DatasetsError

from llama_mimi.common.errors import UserError, first_line
from llama_mimi.common.files import find_files
from llama_mimi.data.corpus_files import PARQUET_ENDINGS, SPLIT_WORDS, splits_in


class PairTable:
    """A table with one pair a row. It is opened when it is first read, and its audio stays on disk until then.

    Args:
        name: of the configuration, data set or folder.
        load: opens its rows.
        columns: of the positive and the negative, each a struct of audio bytes.
    """

    @dataclass(frozen=True)
    class Cell:
        """The audio in one row and column."""

        dataset: Dataset
        index: int
        column: str

        def read_bytes(self) -> bytes:
            """The bytes of the audio file.

            Raises:
                UserError: there are none.
            """
            audio = self.dataset[self.index][self.column]
            if audio is None or audio["bytes"] is None:
                raise UserError(
                    f"row {self.index} of the table has no audio bytes in the column '{self.column}'; embed the audio "
                    "when the table is written"
                )
            return audio["bytes"]

    def __init__(self, name: str, load: Callable[[], Dataset], columns: tuple[str, str]) -> None:
        self.name, self._load, self._columns = name, load, columns

    def __len__(self) -> int:
        return len(self._dataset)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every row without its audio."""
        others = self._dataset.remove_columns(list(self._columns))
        yield from others if others.column_names else ({} for _ in range(len(self)))  # without columns no rows, either

    def cells(self, index: int) -> tuple[Cell, Cell]:
        """Where the positive and the negative of a row are."""
        positive, negative = (self.Cell(audio, index, column) for audio, column in self._audio)
        return positive, negative

    @cached_property
    def _dataset(self) -> Dataset:
        dataset = self._load()
        if missing := [column for column in self._columns if column not in dataset.column_names]:
            raise UserError(
                f"the benchmark '{self.name}' has no column '{missing[0]}', only {', '.join(dataset.column_names)}; "
                "name the data set as it was published"
            )
        for column in self._columns:
            dataset = dataset.cast_column(column, Audio(decode=False))
        return dataset

    @cached_property
    def _audio(self) -> list[tuple[Dataset, str]]:
        return [(self._dataset.select_columns([column]), column) for column in self._columns]


def open_tables(
    source: str, names: Collection[str] | None, known: Collection[str], columns: tuple[str, str]
) -> list[PairTable]:
    """The tables of a benchmark; none where ``source`` is a folder without Parquet files.

    Args:
        source: a hub id (of the owner, or of one of ``names``), a folder, or a Parquet file.
        names: data sets of the benchmark; None takes every configuration or folder.
        known: data sets of all benchmarks, which may lie beside each other.
        columns: of the positive and the negative.

    Raises:
        UserError: neither a folder nor on the hub, or files that it is not clear what they hold.
    """
    root = Path(source)
    if root.is_dir() or root.suffix.lower() in PARQUET_ENDINGS:
        return _local_tables(root, names, known, columns)
    if names is None:
        return [PairTable(config, partial(_load, source, config), columns) for config in _configs(source)]
    if (name := source.rsplit("/", 1)[-1]) in names:
        return [PairTable(name, partial(_load, source, None), columns)]
    return [PairTable(name, partial(_load, f"{source}/{name}", None), columns) for name in names]


def _local_tables(
    root: Path, names: Collection[str] | None, known: Collection[str], columns: tuple[str, str]
) -> list[PairTable]:
    """Tables by data set, or by file or folder where any will do."""
    files: dict[str, list[str]] = {}
    for path in map(Path, find_files(str(root), PARQUET_ENDINGS) if root.is_dir() else [str(root)]):
        folders = [part for part in path.absolute().parent.parts if part not in ("data", "default", *SPLIT_WORDS)]
        if names is not None:
            folders = [part for part in folders if part in known]
            if not folders:
                raise UserError(
                    f"'{path}' lies in no folder named {' or '.join(names)}, so that it is not clear what it holds; "
                    "move it into one"
                )
            if folders[-1] not in names:
                continue  # of another benchmark
        name = folders[-1] if names is not None or is_shard(path) else path.stem
        files.setdefault(name, []).append(str(path))
    for name, paths in files.items():
        splits = sorted({split for split in splits_in(str(root.absolute()), paths) if split})
        if len(splits) > 1:
            raise UserError(f"the table '{name}' in '{root}' has the splits {', '.join(splits)}; move all but one out")
    return [PairTable(name, partial(_load_files, paths), columns) for name, paths in sorted(files.items())]


def is_shard(path: Path) -> bool:
    """Whether a file is called as one part of a split, so that its folder says what it holds."""
    return re.match(r"(train|test|validation|data|part|shard)?[-_.]?(\d|$)", path.stem) is not None


def _load_files(paths: Sequence[str]) -> Dataset:
    try:
        return load_dataset("parquet", data_files=list(paths), split="train")
    except Exception as error:  # datasets wraps what its readers raise
        raise UserError(
            f"'{paths[0]}' or a file beside it is no readable Parquet ({first_line(error)}); copy it anew"
        ) from error


def _configs(hub_id: str) -> list[str]:
    try:
        return get_dataset_config_names(hub_id)
    except (OSError, ValueError, DatasetsError) as error:
        raise _hub_error(hub_id, error) from error


def _load(hub_id: str, config: str | None) -> Dataset:
    try:
        return load_dataset(hub_id, config, split="train")
    except (OSError, ValueError, DatasetsError) as error:
        raise _hub_error(hub_id, error) from error


def _hub_error(hub_id: str, error: Exception) -> UserError:
    return UserError(
        f"'{hub_id}' is neither a folder nor a data set that could be opened on the hub "
        f"({first_line(error)}); download it and give its folder with --data_dir"
    )
