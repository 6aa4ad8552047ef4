"""Open a corpus by its name, folder, path, glob or hub id, on any fsspec file system."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from llama_mimi.common.errors import UserError
from llama_mimi.common.files import file_system, find_files
from llama_mimi.corpora.folder import FolderSource
from llama_mimi.corpora.manifest import LineSource, ManifestSource
from llama_mimi.corpora.parquet import ParquetSource
from llama_mimi.corpora.source import CORPUS_ENDINGS, HUB, Columns, Source, choose_split, splits_in
from llama_mimi.corpora.tar import TarSource

PARQUET_ENDINGS = (".parquet", ".pq")
SAVED = ("state.json", "dataset_dict.json")  # files of `Dataset.save_to_disk` and `DatasetDict.save_to_disk`
# Formats by file ending. The first format with a file in the folder is used: a folder of Parquet files may also contain
# the audio files that they name, and a folder of audio may contain JSON lines and texts. TarSource refuses compressed
# tars.
FORMATS: dict[tuple[str, ...], Callable[..., Source]] = {
    PARQUET_ENDINGS: ParquetSource,
    (".tar",): TarSource,
    CORPUS_ENDINGS: FolderSource,
    (".jsonl",): ManifestSource,
    (".tar.gz", ".tgz"): TarSource,
    (".txt",): LineSource,
}
# Hub id, config and split of named corpora. On the hub and in a local download their files are
# <config>/<split>-*.parquet or <config>/<split>/*.parquet, with the columns audio and text.
CORPORA = {
    "peoples_speech": ("MLCommons/peoples_speech", "clean", "train"),
    "peoples_speech_validation": ("MLCommons/peoples_speech", "validation", "validation"),
    **{
        f"librispeech_{config}_{split}": ("openslr/librispeech_asr", config, split)
        for config, train in (("clean", ("train.100", "train.360")), ("other", ("train.500",)))
        for split in (*train, "validation", "test")
    },
}
# Dataset names in the first release's config files, and their replacements.
RELEASED_NAMES = {
    "librispeech_asr_train": "'librispeech_other_train.500'",
    "librispeech_asr_test": "'librispeech_clean_test'",
    "librispeech_asr": "'librispeech_clean_test'",
    "all": "folders of codes, separated by commas (see config/CORPORA.md)",
}


def open_source(
    dataset: str,
    dataset_path: str | None,
    audio_column: str,
    text_column: str | None,
    extra_columns: Mapping[str, str] = MappingProxyType({}),
    split: str | None = None,
) -> Source:
    """Open a corpus of audio or text; raise a `UserError` if it does not exist, has several splits, or lacks a column.

    Args:
        dataset: a name in `CORPORA`, a path, a glob, ``hf:owner/name`` or ``hf:owner/name:config``.
        dataset_path: local download of a named corpus; if None, the corpus is streamed from the hub.
        audio_column: column of audio; if "", audio is not read.
        text_column: column of transcripts; if None, texts are not read.
        extra_columns: optional columns by role, such as "speaker".
        split: split to read, if the folder or hub id has several splits.
    """
    columns = Columns(audio_column, text_column, extra_columns)
    if is_dataset(dataset):
        from llama_mimi.corpora.dataset import DatasetSource  # datasets takes seconds to import

        return DatasetSource(dataset, columns, split)
    source, files = corpus_files(dataset, dataset_path, split)
    return source(dataset, files, columns)


def is_dataset(dataset: str) -> bool:
    """Return True for a hub id, or for a folder that the library `datasets` has saved."""
    if dataset.startswith(HUB) and "://" not in dataset:
        return True
    if dataset in CORPORA:
        return False
    fs, bare = file_system(dataset)
    try:
        return fs.isdir(bare) and any(fs.isfile(f"{bare.rstrip('/')}/{name}") for name in SAVED)
    except Exception:  # remote file systems raise many types of errors; listing the files will report them
        return False


def check_corpus(dataset: str, dataset_path: str | None, split: str | None) -> None:
    """Raise a `UserError` if a local corpus is missing; files are not opened."""
    if not is_dataset(dataset) and (dataset not in CORPORA or dataset_path is not None):
        corpus_files(dataset, dataset_path, split)


def corpus_files(dataset: str, dataset_path: str | None, split: str | None) -> tuple[Callable[..., Source], list[str]]:
    """Return the format and the sorted files (fsspec paths) of a corpus. Arguments and errors: see `open_source`."""
    if dataset in CORPORA:
        choose_split(dataset, CORPORA[dataset][2:], split)
        return ParquetSource, _named_files(dataset, dataset_path)
    if dataset_path is not None:
        problem = f"dataset_path is '{dataset_path}', but dataset '{dataset}' is not a named corpus"
        remedy = f"remove dataset_path and set dataset to the folder, or set dataset to one of: {', '.join(CORPORA)}"
        raise UserError(f"{problem}; {remedy}")
    found, (fs, bare) = find_files(dataset, sum(FORMATS, ())), file_system(dataset)
    # A single file may have any ending.
    for endings, source in (FORMATS | {(".json",): ManifestSource, ("",): ParquetSource}).items():
        if files := [file for file in found if file.lower().endswith(endings)]:
            below = [file_system(file)[1] for file in files]
            splits = splits_in(bare, below) if fs.isdir(bare) else [None] * len(files)
            chosen = choose_split(dataset, splits, split)
            return source, [file for file, own in zip(files, splits, strict=True) if chosen in (None, own)]
    if dataset in RELEASED_NAMES:
        problem = f"'{dataset}' is a dataset name of the first release of Llama-Mimi"
        raise UserError(f"{problem}; set dataset to {RELEASED_NAMES[dataset]}")
    problem = f"the dataset '{dataset}' does not match any Parquet, tar, audio, JSONL or text file"
    remedy = f"choose a path, a glob, {HUB}owner/name, or one of these corpora: {', '.join(CORPORA)}"
    raise UserError(f"{problem}; {remedy}")


def _named_files(name: str, dataset_path: str | None) -> list[str]:
    hub_id, config, split = CORPORA[name]
    root = (dataset_path or f"hf://datasets/{hub_id}").rstrip("/")
    for pattern in (f"{config}/{split}-*.parquet", f"{config}/{split}/*.parquet"):
        if files := find_files(f"{root}/{pattern}", PARQUET_ENDINGS):
            return files
    problem = f"'{root}' lacks the files {config}/{split}-*.parquet of the corpus '{name}'"
    command = f"hf download {hub_id} --repo-type dataset --local-dir FOLDER"
    raise UserError(f"{problem}; run `{command}`, and set dataset_path to FOLDER")
