"""Speech corpora as streams of rows, local or on the hub.

A corpus is a name from `CORPORA`, a folder of Parquet files, or a Parquet path or glob. Rows are streamed by
`datasets` with their audio undecoded: bytes are turned into samples by `llama_mimi.audio`, which needs no FFmpeg.
"""

import glob
import os
from dataclasses import dataclass
from pathlib import Path

from datasets import Audio, IterableDataset, Value, load_dataset
from datasets.exceptions import DatasetNotFoundError

from llama_mimi.errors import UserError


@dataclass(frozen=True)
class NamedCorpus:
    """Where a published corpus lies and what its columns are called.

    Args:
        hub_id: dataset repository.
        config: its configuration on the hub, which is also the folder of a local download.
        split: its split, which is also how the Parquet files of a local download begin.
        text_column: transcript.
    """

    hub_id: str
    config: str
    split: str
    text_column: str = "text"


# Layouts as published on the hub: <config>/<split>-*.parquet with columns audio{bytes,path} and text.
CORPORA = {
    "peoples_speech": NamedCorpus("MLCommons/peoples_speech", "clean", "train"),
    "peoples_speech_validation": NamedCorpus("MLCommons/peoples_speech", "validation", "validation"),
    **{
        f"librispeech_{config}_{split}": NamedCorpus("openslr/librispeech_asr", config, split)
        for config, split in (
            ("clean", "train.100"),
            ("clean", "train.360"),
            ("other", "train.500"),
            ("clean", "validation"),
            ("other", "validation"),
            ("clean", "test"),
            ("other", "test"),
        )
    },
}


def open_corpus(dataset: str, dataset_path: str | None, audio_column: str, text_column: str | None) -> IterableDataset:
    """Open a corpus as a stream of rows ``{"audio": {"bytes", "path"}, "text": str, "id": str}``.

    Args:
        dataset: a name in `CORPORA`, a folder, or a Parquet path or glob.
        dataset_path: local download of a named corpus; None streams it from the hub.
        audio_column: column of ``audio{bytes,path}`` structs.
        text_column: transcript column; None means that rows have no text.

    Raises:
        UserError: nothing there, or a column is missing.
    """
    files = _local_files(dataset, dataset_path)
    named = CORPORA.get(dataset)
    if named is not None and text_column is not None:
        text_column = named.text_column
    if files is not None:
        rows = load_dataset("parquet", data_files=files, split="train", streaming=True)
    else:
        rows = _open_on_hub(dataset, CORPORA[dataset])
    return _select_columns(rows, dataset, audio_column, text_column)


def check_corpus(dataset: str, dataset_path: str | None) -> None:
    """Fail early, without opening a file, if a local corpus is not there.

    Raises:
        UserError: as `open_corpus`.
    """
    _local_files(dataset, dataset_path)


def _local_files(dataset: str, dataset_path: str | None) -> list[str] | None:
    """The Parquet files of a corpus, or None for one that streams from the hub."""
    named = CORPORA.get(dataset)
    if named is not None:
        return None if dataset_path is None else _named_files(dataset, named, dataset_path)
    if dataset_path is not None:
        raise UserError(
            f"dataset_path is '{dataset_path}', but dataset '{dataset}' is no named corpus; "
            f"name the folder itself as dataset, or one of: {', '.join(CORPORA)}"
        )
    return parquet_files(dataset)


def _open_on_hub(name: str, named: NamedCorpus) -> IterableDataset:
    try:
        return load_dataset(named.hub_id, named.config, split=named.split, streaming=True)
    except (OSError, DatasetNotFoundError) as error:
        raise UserError(
            f"the corpus '{name}' could not be opened on the hub ({str(error).splitlines()[0]}); download it with "
            f"`hf download {named.hub_id} --repo-type dataset --local-dir FOLDER` and set dataset_path to FOLDER"
        ) from error


def _named_files(name: str, named: NamedCorpus, dataset_path: str) -> list[str]:
    for pattern in (f"{named.config}/{named.split}-*.parquet", f"{named.config}/{named.split}/*.parquet"):
        files = sorted(glob.glob(os.path.join(dataset_path, pattern)))
        if files:
            return files
    raise UserError(
        f"'{dataset_path}' holds no {named.config}/{named.split}-*.parquet of the corpus '{name}'; download it with "
        f"`hf download {named.hub_id} --repo-type dataset --local-dir {dataset_path}`"
    )


def parquet_files(dataset: str) -> list[str]:
    """Parquet files of a folder, path or glob, in order.

    Raises:
        UserError: there is none.
    """
    if "://" in dataset:  # any fsspec URL; resolved by `datasets`
        return [dataset]
    pattern = os.path.join(dataset, "**", "*.parquet") if Path(dataset).is_dir() else dataset
    files = sorted(glob.glob(pattern, recursive=True))
    if not files:
        raise UserError(
            f"no Parquet file matches the dataset '{dataset}'; name a folder, a Parquet path or glob, "
            f"or one of: {', '.join(CORPORA)}"
        )
    return files


def _select_columns(rows: IterableDataset, dataset: str, audio_column: str, text_column: str | None) -> IterableDataset:
    columns = rows.column_names or list(next(iter(rows)))
    wanted = {"audio": audio_column} | ({"text": text_column} if text_column is not None else {})
    for role, column in wanted.items():
        if column not in columns:
            raise UserError(
                f"the dataset '{dataset}' has no column '{column}' for the {role}, only {', '.join(columns)}; "
                f"set data.{role}_column"
            )
    if "id" in columns:
        wanted["id"] = "id"
    if rows.features is not None and isinstance(rows.features[audio_column], Audio):
        # A plain struct: even with decode=False the Audio feature wants torchcodec.
        rows = rows.cast_column(audio_column, {"bytes": Value("binary"), "path": Value("string")})
    rows = rows.select_columns(list(wanted.values()))
    return rows.rename_columns({column: role for role, column in wanted.items() if column != role})
