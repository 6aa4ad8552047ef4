"""Corpora as other programs write them: each layout as a row, with what is wanted of it."""

import base64
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from conftest import TINY
from test_clips import read_all, reader

from llama_mimi.audio.reading import OPPOSITE
from llama_mimi.common.errors import UserError
from llama_mimi.common.files import digest
from llama_mimi.data import parquet_corpus
from llama_mimi.data.clip_readers import AudioClip, SkippedClip
from llama_mimi.data.corpora import open_corpus
from llama_mimi.data.corpus_files import corpus_files

PROMPT = (TINY / "prompt.wav").read_bytes()
AUDIO = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def write(path: Path, audio=None, kind=AUDIO, **columns) -> str:
    """One Parquet file of rows with ``audio``, by default a clip; returns its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    audio = [{"bytes": PROMPT, "path": None}] if audio is None else audio
    arrays = {"audio": pa.array(audio, kind)}
    arrays |= {name: values if isinstance(values, pa.Array) else pa.array(values) for name, values in columns.items()}
    pq.write_table(pa.table(arrays), path)
    return str(path.parent)


def parquet_files(dataset: str, split: str | None = None) -> list[str]:
    return corpus_files(dataset, None, split)[1]


def names_of(files) -> list[str]:
    return [Path(file).name for file in files]


# Which files

HUB = ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001", "test-00000-of-00001")


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        ([f"data/{name}.parquet" for name in HUB], "test, train, validation"),
        ([f"{name}.parquet" for name in HUB], "test, train, validation"),
        (["train.parquet", "dev.parquet"], "validation, train"),
        (["train/0.parquet", "eval/0.parquet"], "test, train"),
        (["clean/train/a.parquet", "clean/valid/a.parquet"], "train, validation"),
        (["my_training 1.parquet", "my_testing 1.parquet"], "test, train"),
        (["split=train/0.parquet", "split=test/0.parquet"], "test, train"),
        (["Train-0.parquet", "Test-0.parquet"], "test, train"),
        (["data/train.100-00000-of-00001.parquet", "data/train.360-00000-of-00001.parquet"], "train.100, train.360"),
    ],
)
def test_a_folder_of_several_splits_is_refused(tmp_path, files, splits):
    for file in files:
        write(tmp_path / file)
    with pytest.raises(UserError, match=f"holds the splits {splits}; choose one .data.split"):
        open_corpus(str(tmp_path), None, "audio", None)
    for split in splits.split(", "):
        chosen = parquet_files(str(tmp_path), split)
        assert chosen and len(chosen) < len(files) and open_corpus(str(tmp_path), None, "audio", None, {}, split).files
    with pytest.raises(UserError, match=f"the split 'dreams' was asked for, but .* holds {splits}"):
        parquet_files(str(tmp_path), "dreams")
    assert len(parquet_files(f"{tmp_path}/**/*.parquet")) == len(files)  # a glob says what is meant


@pytest.mark.parametrize(
    "files",
    [
        ["train-0.parquet", "train-1.parquet"],
        ["part-0.parquet", "part-1.parquet"],
        ["constraint.parquet", "latest.parquet"],  # words within words
        ["data/train-00000-of-00001.parquet", "data/extra.parquet"],
    ],
)
def test_a_folder_of_one_split_is_read_whole(tmp_path, files):
    for file in files:
        write(tmp_path / file)
    assert len(open_corpus(str(tmp_path), None, "audio", None).files) == len(files)


def test_other_names_of_a_split_choose_it(tmp_path):
    write(tmp_path / "train.parquet")
    write(tmp_path / "validation.parquet")
    assert names_of(parquet_files(str(tmp_path), "dev")) == ["validation.parquet"]
    with pytest.raises(UserError, match="is not a folder; leave it out"):
        parquet_files(f"{tmp_path}/*.parquet", "train")
    with pytest.raises(UserError, match="is the split 'train' of MLCommons"):
        open_corpus("peoples_speech", None, "audio", None, split="test")


def test_what_lies_beside_a_corpus_is_ignored(tmp_path):
    folder = write(tmp_path / "train-0.parquet")
    for other in ("._train-0.parquet", ".cache/huggingface/part.parquet", "__MACOSX/train-0.parquet", ".hidden.pq"):
        (tmp_path / other).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / other).write_bytes(b"no Parquet")
    for source in (folder, f"{folder}/*.parquet", f"{folder}/**/*.parquet"):
        assert names_of(open_corpus(source, None, "audio", None).files) == ["train-0.parquet"]
    assert len(parquet_files(f"{folder}/._*.parquet")) == 1  # asked for by name


def test_a_corpus_in_a_hidden_folder_is_read(tmp_path):
    folder = write(tmp_path / ".cache" / "speech" / "train-0.parquet")
    assert names_of(parquet_files(folder)) == names_of(parquet_files(f"{folder}/*.parquet")) == ["train-0.parquet"]


def test_links_to_folders_are_followed(tmp_path):
    write(tmp_path / "elsewhere" / "b.parquet")
    folder = write(tmp_path / "corpus" / "a.parquet")
    (tmp_path / "corpus" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "round").symlink_to(tmp_path / "corpus")
    for source in (folder, f"{folder}/**/[ab].parquet"):
        assert set(names_of(parquet_files(source))) == {"a.parquet", "b.parquet"}
    assert len(parquet_files(folder)) == 2 and len(parquet_files(f"{folder}/*/*.parquet")) == 1


def test_two_underscores_hide_folders_not_files(tmp_path):
    folder = write(tmp_path / "__0.parquet")
    write(tmp_path / "__pycache__" / "1.parquet")
    assert names_of(parquet_files(folder)) == ["__0.parquet"]


def test_other_endings(tmp_path):
    for name in ("a.parquet", "b.PARQUET", "c.pq", "d.PQ"):
        write(tmp_path / name)
    (tmp_path / "e.txt").touch()
    assert names_of(parquet_files(str(tmp_path))) == ["a.parquet", "b.PARQUET", "c.pq", "d.PQ"]


@pytest.mark.parametrize("folder", ["my [speech]", "a?b", "[0-9]*", "plain"])
def test_names_that_look_like_globs(tmp_path, folder):
    path = write(tmp_path / folder / "train-0.parquet")
    write(tmp_path / "other" / "train-1.parquet")
    assert names_of(parquet_files(path)) == ["train-0.parquet"]
    assert names_of(parquet_files(f"{path}/train-0.parquet")) == ["train-0.parquet"]
    if "[" not in folder or "*" not in folder:
        assert names_of(parquet_files(f"{path}/*.parquet")) == ["train-0.parquet"]


# Which columns


def test_a_large_row_group_is_read_in_parts(tmp_path, monkeypatch):
    audio = [{"bytes": PROMPT[: 20_000 + i], "path": None} for i in range(7)]
    folder = write(tmp_path / "x.parquet", audio, id=[f"clip {i}" for i in range(7)])
    whole = open_corpus(folder, None, "audio", None)
    monkeypatch.setattr(parquet_corpus, "MAX_GROUP_BYTES", 100_000)
    parts = open_corpus(folder, None, "audio", None)
    size = pq.read_metadata(tmp_path / "x.parquet").row_group(0).total_byte_size
    assert whole.fingerprint == digest([["x.parquet"], [[[7, size]]]]), "runs of earlier versions resume"
    assert whole.rows_per_group.tolist() == [7] and parts.rows_per_group.tolist() == [1] * 7
    assert pa.concat_tables(map(parts.read_group, range(7))).equals(whole.read_group(0))
    assert parts.row_name(3, 0) == whole.row_name(0, 3) and parts.fingerprint != whole.fingerprint


def test_a_row_group_that_grows_in_memory_is_refused(tmp_path, monkeypatch):
    """Equal values are stored once in a file, so that a small file may take any memory."""
    folder = write(tmp_path / "x.parquet", [{"bytes": PROMPT, "path": None}] * 50)
    monkeypatch.setattr(parquet_corpus, "MAX_GROUP_BYTES", 10 * len(PROMPT))
    corpus = open_corpus(folder, None, "audio", None)
    with pytest.raises(UserError, match="row group 0 of .* takes more than .* bytes of memory"):
        corpus.read_group(0)


def test_a_column_that_stands_twice(tmp_path):
    column = pa.array([{"bytes": PROMPT, "path": None}], AUDIO)
    table = pa.Table.from_arrays([column, pa.array(["a"]), pa.array(["b"])], names=["audio", "text", "text"])
    pq.write_table(table, tmp_path / "train-0.parquet")
    assert len(read_all(reader(str(tmp_path)))) == 1  # nobody asks for it
    with pytest.raises(UserError, match="the column 'text' .* stands there 2 times"):
        open_corpus(str(tmp_path), None, "audio", "text")
    with pytest.raises(UserError, match="the column 'text' .* stands there 2 times"):
        open_corpus(str(tmp_path), None, "audio", None, {"text": "text"})


def test_one_column_in_two_roles(tmp_path):
    folder = write(tmp_path / "train-0.parquet", id=["some words"], speaker=["x"])
    (clip,) = read_all(reader(folder, text="id"))
    assert (clip.name, clip.text) == ("some words", "some words")
    corpus = open_corpus(folder, None, "audio", None, {"text": "speaker", "speaker": "speaker"})
    assert corpus.read_group(0).select(["text", "speaker"]).to_pylist() == [{"text": "x", "speaker": "x"}]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (pa.array(["déjà vu"]), "déjà vu"),
        (pa.array(["déjà vu"], pa.large_string()), "déjà vu"),
        (pa.array(["déjà vu".encode()]), "déjà vu"),
        (pa.array(["déjà vu".encode()], pa.large_binary()), "déjà vu"),
        (pa.array(["déjà vu"]).dictionary_encode(), "déjà vu"),
    ],
    ids=str,
)
def test_transcripts_are_text(tmp_path, values, text):
    folder = write(tmp_path / "train-0.parquet", text=values)
    (clip,) = read_all(reader(folder, text="text"))
    assert clip.text == text


@pytest.mark.parametrize("values", [[["a", "b"]], [7], [{"a": "b"}], [True]], ids=str)
def test_transcripts_that_are_no_text_are_refused(tmp_path, values):
    folder = write(tmp_path / "train-0.parquet", text=values)
    for text_column, extra in (("text", {}), (None, {"text": "text"})):
        with pytest.raises(UserError, match=r"which is no text; say which it is \(data.text_column, or --text_column"):
            open_corpus(folder, None, "audio", text_column, extra)
    assert isinstance(read_all(reader(folder))[0], AudioClip)  # nobody asks for it


def test_bytes_that_are_no_text_are_a_reason(tmp_path):
    audio = [{"bytes": PROMPT, "path": None}] * 2
    folder = write(tmp_path / "train-0.parquet", audio, text=[b"\xff\xfe", b"good"], id=[b"\xff1", b"two"])
    bad, good = read_all(reader(folder, text="text"))
    assert bad.reason == "text is no UTF-8" and "'\\xff1'" in bad.message and (good.name, good.text) == ("two", "good")


# Which audio


def clip_of(tmp_path, row, kind=AUDIO):
    (clip,) = read_all(reader(write(tmp_path / "corpus" / "train-0.parquet", [row], kind, id=["a"])))
    return clip


@pytest.mark.parametrize(
    ("row", "kind", "reason"),
    [
        ({"bytes": base64.b64encode(PROMPT).decode()}, pa.struct({"bytes": pa.string()}), "not bytes"),
        ({"bytes": list(PROMPT[:99])}, pa.struct({"bytes": pa.list_(pa.uint8())}), "not bytes"),
        ({"bytes": [0.5, 0.25]}, pa.struct({"bytes": pa.list_(pa.float64())}), "not bytes"),
        ({"bytes": base64.b64encode(PROMPT)}, pa.struct({"bytes": pa.binary()}), "unreadable"),
        ({"bytes": b"", "path": "nowhere.wav"}, AUDIO, "empty"),
        ({"bytes": b"", "path": None}, AUDIO, "empty"),
        ({"bytes": None, "path": "nowhere.wav"}, AUDIO, "missing"),
        ({"bytes": None, "path": "x" * 5000}, AUDIO, "unreadable"),
        ({"bytes": None, "path": "memory://nowhere.wav"}, AUDIO, "missing"),
        ({"bytes": None, "path": "nothing://a.wav"}, AUDIO, "unexpected"),
        ({"bytes": None, "path": "."}, AUDIO, "unreadable"),
        ({"bytes": None, "path": ""}, AUDIO, "no audio"),
        ({"bytes": b"", "path": ""}, AUDIO, "empty"),
        ({"bytes": None, "path": 7}, pa.struct({"bytes": pa.binary(), "path": pa.int64()}), "unexpected"),
        (None, AUDIO, "no audio"),
    ],
)
def test_an_odd_row_is_skipped_with_its_reason(tmp_path, row, kind, reason):
    clip = clip_of(tmp_path, row, kind)
    assert isinstance(clip, SkippedClip) and clip.reason == reason and "\n" not in clip.message, clip
    assert len(clip.message) < 6000


def test_a_path_of_another_type_beside_good_bytes(tmp_path):
    kind = pa.struct({"bytes": pa.binary(), "path": pa.int64()})
    (clip,) = read_all(reader(write(tmp_path / "train-0.parquet", [{"bytes": PROMPT, "path": 7}], kind)))
    assert isinstance(clip, AudioClip) and clip.name == "7"


@pytest.mark.parametrize("content", [None, b""])
def test_paths_lie_beside_the_parquet_file(tmp_path, content, monkeypatch):
    for place in ("corpus/clips", "elsewhere"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "a.wav").write_bytes(PROMPT)
    monkeypatch.chdir(tmp_path / "elsewhere")
    for path in ("clips/a.wav", "../elsewhere/a.wav", str(tmp_path / "elsewhere" / "a.wav")):
        assert isinstance(clip_of(tmp_path, {"bytes": content, "path": path}), AudioClip)
    assert clip_of(tmp_path, {"bytes": None, "path": "a.wav"}).reason == "missing"  # not where somebody happens to be


def test_paths_beside_a_remote_parquet_file(tmp_path):
    memory = fsspec.filesystem("memory")
    path = tmp_path / "train-0.parquet"
    write(path, [{"bytes": None, "path": "clips/a.wav"}])
    memory.pipe_file("/odd/train-0.parquet", path.read_bytes())
    memory.pipe_file("/odd/clips/a.wav", PROMPT)
    (clip,) = read_all(reader("memory://odd"))
    assert isinstance(clip, AudioClip)


def test_what_was_done_to_a_clip_goes_with_it(tmp_path):
    samples, rate_hz = soundfile.read(TINY / "prompt.wav", dtype="float32")
    path = tmp_path / "opposite.wav"
    soundfile.write(path, [[a, -a] for a in samples], rate_hz)
    assert clip_of(tmp_path, {"bytes": path.read_bytes(), "path": None}).audio_warnings == (OPPOSITE,)
    flac = tmp_path / "a.flac"
    soundfile.write(flac, samples, rate_hz)
    content = bytearray(flac.read_bytes())
    content[24] |= 0xF0  # the length
    clip = clip_of(tmp_path / "flac", {"bytes": bytes(content), "path": None})
    assert isinstance(clip, AudioClip) and clip.is_cut  # no more was read than is wanted
    (clip,) = read_all(reader(str(tmp_path / "flac" / "corpus"), None, 99))
    assert isinstance(clip, SkippedClip) and clip.reason == "breaks off"
