"""Where a corpus lies: a name, a folder, a path or a glob, on any fsspec file system, to its format and files."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from llama_mimi.audio.reading import AUDIO_ENDINGS
from llama_mimi.common.errors import UserError, first_line
from llama_mimi.common.files import file_system, find_files, is_local

PARQUET_ENDINGS = (".parquet", ".pq")
# Of audio in corpora; those of the second line need FFmpeg.
CORPUS_ENDINGS = (
    *(*AUDIO_ENDINGS, ".oga", ".opus", ".aiff", ".aif", ".au"),
    *(".m4a", ".aac", ".webm", ".wma"),
)
# Formats by the endings of their files, in the order in which a folder is taken for them: audio may lie beside Parquet
# files that name it, and JSON lines beside audio are about it.
ENDINGS = {
    "parquet": PARQUET_ENDINGS,
    "tar": (".tar",),
    "audio": CORPUS_ENDINGS,
    "manifest": (".jsonl",),
    "compressed tar": (".tar.gz", ".tgz"),
}
HUB = "hf:"  # before an id of any dataset on the hub
# Files of `Dataset.save_to_disk` and `DatasetDict.save_to_disk`.
SAVED = ("state.json", "dataset_dict.json")


@dataclass(frozen=True)
class NamedCorpus:
    """Place of a published corpus; its columns are called audio and text."""

    hub_id: str
    config: str  # on the hub, and the folder of a local download
    split: str  # on the hub, and the beginning of file names in a local download


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

# Names in the first release's config files, and what to set here.
RELEASED_NAMES = {
    "librispeech_asr_train": "'librispeech_other_train.500'",
    "librispeech_asr_test": "'librispeech_clean_test'",
    "librispeech_asr": "'librispeech_clean_test'",
    "all": "folders of codes, divided by commas; config/CORPORA.md says how to make them",
}

# Words that name a split, by the hub's rules (huggingface.co/docs/hub/datasets-file-names-and-splits).
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
# Beyond these rules capitals do not matter, and "=" stands between words, too: split=train is a folder of Hive.
_SPLIT_WORD = re.compile(rf"(?:^|[-._= 0-9])({'|'.join(SPLIT_WORDS)})(?=[-._= 0-9]|$)")
_SPLIT_OF_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}\S*\.\w+")


def is_dataset(dataset: str) -> bool:
    """Return True for a hub id, or a folder that the library `datasets` has saved."""
    if dataset.startswith(HUB) and "://" not in dataset:
        return True
    if dataset in CORPORA:
        return False
    fs, bare = file_system(dataset)
    try:
        return fs.isdir(bare) and any(fs.isfile(f"{bare.rstrip('/')}/{name}") for name in SAVED)
    except Exception:  # remote file systems raise what their transports raise; who lists the files says it
        return False


def corpus_files(dataset: str, dataset_path: str | None, split: str | None) -> tuple[str, list[str]]:
    """Return the format and files of a corpus, in order, as fsspec paths; arguments as `open_corpus`.

    Raises:
        UserError: there is none, or a folder contains several splits and none was chosen.
    """
    named = CORPORA.get(dataset)
    if named is not None:
        if split is not None:
            raise UserError(
                f"the split '{split}' was asked for, but the corpus '{dataset}' is the split '{named.split}' of "
                f"{named.hub_id}; leave it out"
            )
        return "parquet", _named_files(dataset, named, dataset_path)
    if dataset_path is not None:
        raise UserError(
            f"dataset_path is '{dataset_path}', but dataset '{dataset}' is no named corpus; "
            f"name the folder itself as dataset, or one of: {', '.join(CORPORA)}"
        )
    found = find_files(dataset, tuple(ending for endings in ENDINGS.values() for ending in endings))
    for kind, endings in ENDINGS.items():
        if files := [file for file in found if file.lower().endswith(endings)]:
            return kind, _of_split(dataset, files, split)
    if found and all(file.lower().endswith(".json") for file in found):  # so are NeMo's manifests called
        return "manifest", _of_split(dataset, found, split)
    if found:  # by a name without an ending
        return "parquet", _of_split(dataset, found, split)
    if dataset in RELEASED_NAMES:
        raise UserError(f"'{dataset}' is a dataset name of the first release; set {RELEASED_NAMES[dataset]}")
    raise UserError(
        f"no Parquet, tar or audio file and no JSONL manifest matches the dataset '{dataset}'; name a folder, a path, "
        f"a glob, {HUB} and the id of a dataset, a folder of codes by scripts/tokenize_corpus.py, or one of: "
        f"{', '.join(CORPORA)}"
    )


def _named_files(name: str, named: NamedCorpus, dataset_path: str | None) -> list[str]:
    root, reason = (dataset_path or f"hf://datasets/{named.hub_id}").rstrip("/"), "no such files"
    try:
        for pattern in (f"{named.config}/{named.split}-*.parquet", f"{named.config}/{named.split}/*.parquet"):
            if files := find_files(f"{root}/{pattern}", PARQUET_ENDINGS):
                return files
    except Exception as error:  # the hub's client raises what its transports raise
        reason = first_line(error)
    raise UserError(
        f"'{root}' contains no {named.config}/{named.split}-*.parquet of the corpus '{name}' ({reason}); download it "
        f"with `hf download {named.hub_id} --repo-type dataset --local-dir FOLDER` and set dataset_path to FOLDER"
    )


def open_beside(path: str, file: str) -> str | bytes:
    """Return a path, relative to the folder of ``file``, if it is local, or the bytes of a remote file.

    Raises:
        OSError: a remote file cannot be read.
    """
    fs, bare = file_system(path if "://" in path or os.path.isabs(path) else f"{file.rsplit('/', 1)[0]}/{path}")
    return bare if is_local(fs) else fs.cat_file(bare)


def check_corpus(dataset: str, dataset_path: str | None, split: str | None) -> None:
    """Raise a UserError early, without opening a file, if a local corpus is missing."""
    if not is_dataset(dataset) and (dataset not in CORPORA or dataset_path is not None):
        corpus_files(dataset, dataset_path, split)


def _of_split(dataset: str, files: list[str], split: str | None) -> list[str]:
    """Files of a split of a folder, by the hub's rules; all where there is one."""
    fs, bare = file_system(dataset)
    is_folder = fs.isdir(bare)
    splits = splits_in(bare, [file_system(file)[1] for file in files]) if is_folder else [None] * len(files)
    found = list(dict.fromkeys(name for name in splits if name))
    if split is None:
        if len(found) > 1:
            raise UserError(
                f"the folder '{dataset}' holds the splits {', '.join(found)}; choose one (data.split, "
                "data.validation_split, or --split of a script), or name its files by a glob"
            )
        return files
    wanted = SPLIT_WORDS.get(split, split)
    chosen = [file for file, name in zip(files, splits, strict=True) if name == wanted]
    if not chosen:
        raise UserError(
            f"the split '{split}' was asked for, but '{dataset}' "
            + (f"holds {', '.join(found) or 'no splits'}" if is_folder else "is not a folder")
            + "; leave it out, or name files by a glob"
        )
    return chosen


def splits_in(folder: str, files: Sequence[str]) -> list[str | None]:
    """The split of each file, by the hub's rules; None where its path names none.

    Files are called ``data/<split>-00000-of-00001.parquet``, or have one of `SPLIT_WORDS` between other characters than
    letters in the name of a folder below ``folder``, or in their own; the first rule that any file meets holds for all.
    """
    below = [file[len(folder.rstrip("/")) + 1 :].split("/") for file in files]
    shards = [
        match[1] if parts[:-1] == ["data"] and (match := _SPLIT_OF_SHARD.fullmatch(parts[-1])) else None
        for parts in below
    ]
    folders = [next((word for part in reversed(parts[:-1]) if (word := _split_word(part))), None) for parts in below]
    names = [_split_word(parts[-1]) for parts in below]
    return next((rule for rule in (shards, folders, names) if any(rule)), names)


def _split_word(name: str) -> str | None:
    match = _SPLIT_WORD.search(name.lower())
    return SPLIT_WORDS[match[1]] if match else None
