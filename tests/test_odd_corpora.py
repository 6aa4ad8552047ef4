"""Parquet corpora of other programs: files, columns and audio."""

import base64
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import TINY
from test_formats import clips_of, rows_of

from llama_mimi.common.errors import UserError
from llama_mimi.common.files import digest
from llama_mimi.corpora import parquet
from llama_mimi.corpora.clips import CodedClip, SkippedClip
from llama_mimi.corpora.formats import corpus_files, open_source

PROMPT = (TINY / "prompt.wav").read_bytes()
AUDIO = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def write(path: Path, audio=None, kind=AUDIO, **columns) -> str:
    """Write a Parquet file with ``audio`` (default: one clip) and return its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    audio = [{"bytes": PROMPT, "path": None}] if audio is None else audio
    arrays = {"audio": pa.array(audio, kind)}
    arrays |= {name: values if isinstance(values, pa.Array) else pa.array(values) for name, values in columns.items()}
    pq.write_table(pa.table(arrays), path)
    return str(path.parent)


def opened(place, text_column=None, extra_columns=None, split=None):
    return open_source(str(place), None, "audio", text_column, extra_columns or {}, split)


def names_of(dataset, split: str | None = None) -> list[str]:
    return [Path(file).name for file in corpus_files(str(dataset), None, split)[1]]


# Files

HUB = ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001", "test-00000-of-00001")


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        ([f"data/{name}.parquet" for name in HUB], "test, train, validation"),
        ([f"{name}.parquet" for name in HUB], "test, train, validation"),
        (["train/0.parquet", "eval/0.parquet"], "test, train"),
        (["clean/train/a.parquet", "clean/valid/a.parquet"], "train, validation"),
        (["split=train/0.parquet", "split=test/0.parquet"], "test, train"),
        (["Train-0.parquet", "Test-0.parquet"], "test, train"),
        (["data/train.100-00000-of-00001.parquet", "data/train.360-00000-of-00001.parquet"], "train.100, train.360"),
        (["part-0.parquet", "part-1.parquet"], None),
        (["constraint.parquet", "latest.parquet"], None),  # a split's name inside other words
        (["data/train-00000-of-00001.parquet", "data/extra.parquet"], None),
    ],
)
def test_splits_of_a_folder(tmp_path, files, splits):
    for file in files:
        write(tmp_path / file)
    if splits is None:
        assert len(opened(tmp_path).units) == len(files)
        return
    with pytest.raises(UserError, match=f"contains the splits {splits}; set data.split"):
        opened(tmp_path)
    for split in splits.split(", "):
        assert 0 < len(names_of(tmp_path, split)) < len(files) and opened(tmp_path, split=split).units
    with pytest.raises(UserError, match=f"the split 'dreams' does not exist: .* contains the splits {splits}"):
        names_of(tmp_path, "dreams")
    assert len(names_of(f"{tmp_path}/**/*.parquet")) == len(files)  # a glob ignores splits


def test_other_names_of_a_split_choose_it(tmp_path):
    write(tmp_path / "train.parquet")
    write(tmp_path / "validation.parquet")
    assert names_of(tmp_path, "dev") == ["validation.parquet"]
    with pytest.raises(UserError, match="contains files without splits; remove the setting"):
        names_of(f"{tmp_path}/*.parquet", "train")
    with pytest.raises(UserError, match="'test' does not exist: 'peoples_speech' contains the splits train; set one"):
        opened("peoples_speech", split="test")


def test_hidden_files_and_links(tmp_path):
    folder = write(tmp_path / ".cache" / "a" / "train-0.parquet")  # a hidden folder is read if it is named
    for other in ("._train-0.parquet", ".cache/huggingface/part.parquet", "__MACOSX/train-0.parquet", ".hidden.pq"):
        (tmp_path / ".cache/a" / other).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / ".cache/a" / other).write_bytes(b"not Parquet")
    for source in (folder, f"{folder}/*.parquet", f"{folder}/**/*.parquet"):
        assert names_of(source) == ["train-0.parquet"]
    write(tmp_path / "elsewhere" / "b.parquet")
    folder = write(tmp_path / "corpus" / "a.parquet")
    (tmp_path / "corpus" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "round").symlink_to(tmp_path / "corpus")
    assert names_of(folder) == ["a.parquet", "b.parquet"] and len(names_of(f"{folder}/*/*.parquet")) == 1
    assert set(names_of(f"{folder}/**/[ab].parquet")) == {"a.parquet", "b.parquet"}


@pytest.mark.parametrize("folder", ["my [speech]", "a?b", "[0-9]*", "plain"])
def test_names_that_look_like_globs_and_other_endings(tmp_path, folder):
    path = write(tmp_path / folder / "train-0.parquet")
    write(tmp_path / "other" / "train-1.parquet")
    assert names_of(path) == names_of(f"{path}/train-0.parquet") == ["train-0.parquet"]
    if "[" not in folder or "*" not in folder:
        assert names_of(f"{path}/*.parquet") == ["train-0.parquet"]
    for name in ("__0.parquet", "b.PARQUET", "c.pq", "d.PQ", "__pycache__/1.parquet"):
        write(tmp_path / folder / name)
    (tmp_path / folder / "e.txt").touch()
    assert names_of(path) == ["__0.parquet", "b.PARQUET", "c.pq", "d.PQ", "train-0.parquet"]


# Columns


def test_a_large_row_group_is_read_in_parts(tmp_path, monkeypatch):
    audio = [{"bytes": PROMPT[: 20_000 + i], "path": None} for i in range(7)]
    folder = write(tmp_path / "x.parquet", audio, text=[f"clip {i}" for i in range(7)])
    whole = opened(folder, "text")
    monkeypatch.setattr(parquet, "MAX_GROUP_BYTES", 100_000)
    parts = opened(folder, "text")
    size = pq.read_metadata(tmp_path / "x.parquet").row_group(0).total_byte_size
    assert whole.fingerprint == digest([["x.parquet"], [[[7, size]]]]), "runs of earlier versions resume"
    assert [unit.num_rows for unit in whole.units] == [7] and [unit.num_rows for unit in parts.units] == [1] * 7
    assert rows_of(parts) == rows_of(whole)
    assert rows_of(whole)[3]["name"] == f"row 3 of row group 0 of {tmp_path}/x.parquet"


def test_a_row_group_that_grows_in_memory_is_refused(tmp_path, monkeypatch):
    """A Parquet file stores equal values once, so a small file may need any amount of memory."""
    folder = write(tmp_path / "x.parquet", [{"bytes": PROMPT, "path": None}] * 50)
    monkeypatch.setattr(parquet, "MAX_GROUP_BYTES", 10 * len(PROMPT))
    with pytest.raises(UserError, match="row group 0 of .* needs over .* bytes of memory, more than the file's footer"):
        rows_of(opened(folder))


def test_a_text_that_is_not_utf_8_is_a_bad_row(tmp_path):
    text = pa.array([b"first", b"\xff", b"third"]).view(pa.string())
    folder = write(tmp_path / "x.parquet", [{"bytes": PROMPT, "path": None}] * 3, text=text)
    first, bad, third = clips_of(opened(folder, "text"), with_text=True)
    assert (first.text, bad.reason, third.text) == ("first", "damaged row", "third")


def test_a_column_in_two_roles(tmp_path):
    folder = write(tmp_path / "b" / "train-0.parquet", id=["some words"], speaker=["x"])
    (clip,) = clips_of(opened(folder, "id"), with_text=True)
    assert (clip.name, clip.text) == ("some words", "some words")
    (row,) = rows_of(opened(folder, None, {"text": "speaker", "speaker": "speaker"}))
    assert row["text"] == row["speaker"] == "x"


def test_transcripts_are_text(tmp_path):
    plain, in_bytes = pa.array(["déjà vu"]), pa.array(["déjà vu".encode()])
    large = plain.cast(pa.large_string()), in_bytes.cast(pa.large_binary())
    for number, values in enumerate((plain, in_bytes, *large, plain.dictionary_encode())):
        folder = write(tmp_path / str(number) / "train-0.parquet", text=values)
        (clip,) = clips_of(opened(folder, "text"), with_text=True)
        assert clip.text == "déjà vu"
    for number, values in enumerate(([["a", "b"]], [{"a": "b"}])):
        folder = write(tmp_path / f"no {number}" / "train-0.parquet", text=values)
        (clip,) = clips_of(opened(folder, "text"), with_text=True)
        assert clip.reason == "damaged row" and "its text cannot be stored (it is a " in clip.message
        assert isinstance(clips_of(opened(folder))[0], CodedClip)  # the text is not read
    audio = [{"bytes": PROMPT, "path": None}] * 2
    folder = write(tmp_path / "odd" / "train-0.parquet", audio, text=[b"\xff\xfe", b"good"], id=[b"\xff1", b"two"])
    bad, good = clips_of(opened(folder, "text"), with_text=True)
    assert bad.reason == "damaged row" and "'\\xff1'" in bad.message and "its text cannot be stored" in bad.message
    assert (good.name, good.text) == ("two", "good")


# Audio


def clip_of(folder, row, kind=AUDIO, **options):
    (clip,) = clips_of(opened(write(folder / "corpus" / "train-0.parquet", [row], kind, id=["a"])), **options)
    return clip


@pytest.mark.parametrize(
    ("row", "kind", "reason"),
    [
        ({"bytes": base64.b64encode(PROMPT).decode()}, pa.struct({"bytes": pa.string()}), "damaged row"),
        ({"bytes": list(PROMPT[:99])}, pa.struct({"bytes": pa.list_(pa.uint8())}), "damaged row"),
        ({"bytes": base64.b64encode(PROMPT)}, pa.struct({"bytes": pa.binary()}), "unreadable"),
        ({"bytes": b"", "path": None}, AUDIO, "empty"),
        ({"bytes": b"", "path": "nowhere.wav"}, AUDIO, "missing"),
        ({"bytes": None, "path": "nowhere.wav"}, AUDIO, "missing"),
        ({"bytes": None, "path": "x" * 5000}, AUDIO, "unreadable"),
        ({"bytes": None, "path": "memory://nowhere.wav"}, AUDIO, "missing"),
        ({"bytes": None, "path": "nothing://a.wav"}, AUDIO, "unexpected"),
        ({"bytes": None, "path": "."}, AUDIO, "missing"),
        ({"bytes": None, "path": ""}, AUDIO, "no audio"),
        ({"bytes": None, "path": 7}, pa.struct({"bytes": pa.binary(), "path": pa.int64()}), "damaged row"),
        ([0.5, 0.25], pa.list_(pa.float32()), "damaged row"),
        (None, AUDIO, "no audio"),
    ],
)
def test_an_odd_row_is_skipped_with_its_reason(tmp_path, row, kind, reason):
    clip = clip_of(tmp_path, row, kind)
    assert isinstance(clip, SkippedClip) and clip.reason == reason and "\n" not in clip.message, clip
    assert len(clip.message) < 6000


@pytest.mark.parametrize("content", [None, b""])
def test_paths_lie_beside_the_parquet_file(tmp_path, content, monkeypatch):
    for place in ("corpus/clips", "elsewhere"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "a.wav").write_bytes(PROMPT)
    monkeypatch.chdir(tmp_path / "elsewhere")
    for path in ("clips/a.wav", "../elsewhere/a.wav", str(tmp_path / "elsewhere" / "a.wav")):
        assert isinstance(clip_of(tmp_path, {"bytes": content, "path": path}), CodedClip)
    assert (
        clip_of(tmp_path, {"bytes": None, "path": "a.wav"}).reason == "missing"
    )  # the working directory is not searched
    memory = fsspec.filesystem("memory")
    write(tmp_path / "train-0.parquet", [{"bytes": content, "path": "clips/a.wav"}])
    memory.pipe_file("/odd/train-0.parquet", (tmp_path / "train-0.parquet").read_bytes())
    memory.pipe_file("/odd/clips/a.wav", PROMPT)
    (clip,) = clips_of(opened("memory://odd"))
    assert isinstance(clip, CodedClip)
