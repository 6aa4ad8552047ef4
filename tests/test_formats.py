"""Corpora as they are published: the same clips, the same codes, whatever they come in; and what may be wrong there."""

import io
import json
import os
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from conftest import TINY, costly
from datasets import ClassLabel, DatasetDict
from hypothesis import given
from hypothesis import strategies as st
from layouts import (
    LAYOUTS,
    add,
    dataset,
    in_json_files,
    in_parquet,
    in_parts_of_one_recording,
    in_tar,
    lossless_rows,
    said,
)
from test_code_store import tokenize

from llama_mimi.audio.reading import SHORTER, AudioError, read_audio
from llama_mimi.audio.splitting import split_at_pauses
from llama_mimi.common.errors import UserError
from llama_mimi.data import clip_readers, tar_corpus
from llama_mimi.data.clip_readers import AudioClip, AudioReader, SkippedClip
from llama_mimi.data.clips import ClipStream
from llama_mimi.data.corpora import open_corpus
from llama_mimi.data.duplicates import settle_duplicates
from llama_mimi.data.order import ClipRef, RowsInOrder
from llama_mimi.data.row_filter import RowFilter

RATE = 24_000
COLUMNS = {"text": "text", "speaker": "speaker"}
DEEP = f'{{"text": {"[" * 100_000}{"]" * 100_000}}}'  # of which json raises a RecursionError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_corpus, "HF_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def rows():
    """Five clips as lossless files, with what is said about them."""
    found = lossless_rows(str(TINY / "corpus" / "validation-*.parquet"), 5, 2.0)
    return [row | {"samples": soundfile.read(io.BytesIO(row["bytes"]), dtype="int16")[0]} for row in found]


def opened(path, text_column=None, split=None):
    return open_corpus(str(path), None, "audio", text_column, COLUMNS, split)


def clips_of(corpus, max_frames=12, with_text=False):
    reader = AudioReader(corpus, sample_rate_hz=RATE, frame_size=1920, max_frames=max_frames, with_text=with_text)
    order = RowsInOrder(corpus.rows_per_group, range(len(corpus.rows_per_group)))
    return [clip for chunk in ClipStream([reader], order, 3).load() for clip in chunk.clips]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_clips_in_every_layout(rows, layout, tmp_path):
    """Format x layout x what is read: samples to the bit, texts, speakers, names and whether they were cut."""
    place = LAYOUTS[layout](tmp_path, rows)
    corpus = opened(place)
    assert {"audio", "text", "speaker"} <= set(corpus.columns)
    by_name = {Path(clip.name).name: clip for clip in clips_of(corpus, max_frames=100)}
    assert by_name.keys() == {row["name"] for row in rows}
    for row in rows:
        clip = by_name[row["name"]]
        assert np.array_equal(clip.samples_S.numpy(), read_audio(row["bytes"], RATE).samples_S.numpy())
        assert clip.text == row["text"] and not clip.is_cut
        assert clip.speaker == (row["name"][0] if layout == "LibriSpeech" else row["speaker"])
    assert all(clip.is_cut and len(clip.samples_S) == 12 * 1920 for clip in clips_of(corpus))
    again = opened(place)
    assert again.fingerprint == corpus.fingerprint and list(again.rows_per_group) == list(corpus.rows_per_group)
    with_text = open_corpus(str(place), None, "audio", "text")
    assert all(isinstance(clip, AudioClip) and clip.text for clip in clips_of(with_text, with_text=True))
    with pytest.raises(UserError, match="has no column 'said' for the text, only .*text"):
        open_corpus(str(place), None, "audio", "said")


@pytest.mark.parametrize("layout", ["tar", "LibriSpeech", "manifest of parts", "Arrow"])
def test_the_same_codes_through_every_format_on_any_ranks(rows, layout, tmp_path):
    def codes(name, place, nproc):
        done = tokenize(place, tmp_path / name, "--clips_per_shard", 2, nproc=nproc)
        assert done.returncode == 0, done.output[-2000:]
        stored = pq.read_table(sorted((tmp_path / name).glob("shard-*.parquet"))).to_pylist()
        return {Path(row["id"]).name: (row["codes"], row["text"]) for row in stored}

    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    expected = codes("of_parquet", in_parquet(tmp_path / "a", rows), 1)
    assert codes("of_other", LAYOUTS[layout](tmp_path / "b", rows), 2) == expected and len(expected) == 5


def test_splits_of_folders_and_of_saved_datasets(rows, tmp_path):
    for split in ("train", "test"):
        (tmp_path / "f" / split).mkdir(parents=True)
        in_json_files(tmp_path / "f" / split, rows[: 3 if split == "train" else 2])
    with pytest.raises(UserError, match="holds the splits test, train; choose one"):
        opened(tmp_path / "f")
    assert int(opened(tmp_path / "f", split="test").rows_per_group.sum()) == 2
    DatasetDict(train=dataset(rows), test=dataset(rows[:2])).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(UserError, match="holds the splits train, test; choose one"):
        opened(tmp_path / "d")
    assert int(opened(tmp_path / "d", split="test").rows_per_group.sum()) == 2
    with pytest.raises(UserError, match="'dev' was asked for, but .* holds train, test; choose one"):
        opened(tmp_path / "d", split="dev")
    with pytest.raises(UserError, match="the dataset 'hf:nobody/nothing' could not be loaded"):
        opened("hf:nobody/nothing")


@costly(max_examples=24)
@given(
    num_rows=st.integers(1, 250),
    parts=st.integers(1, 4),
    layout=st.sampled_from(["tar", "manifest"]),
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=3),
)
def test_every_row_once_over_changing_ranks(tmp_path_factory, num_rows, parts, layout, ranks):
    """Rows are dealt to ranks by group, as Parquet's; each is read once and under its own name."""
    folder = tmp_path_factory.mktemp("rows")
    names = [f"{number:05d}" for number in range(num_rows)]
    for part in range(parts):
        of_part = names[part * num_rows // parts : (part + 1) * num_rows // parts]
        if not of_part:
            continue
        if layout == "manifest":
            lines = [json.dumps({"audio_filepath": "x.wav", "id": name}) for name in of_part]
            (folder / f"{part}.jsonl").write_text("\n".join(lines))
        else:
            with tarfile.open(folder / f"{part}.tar", "w") as tar:
                for name in of_part:
                    add(tar, f"{name}.wav", name.encode())
    corpus = opened(folder)
    assert int(corpus.rows_per_group.sum()) == num_rows and corpus.rows_per_group.max() <= 100
    for world in ranks:
        read = []
        for rank in range(world):
            for ref in RowsInOrder(corpus.rows_per_group, range(len(corpus.rows_per_group)), rank, world):
                row = corpus.read_group(ref.group).slice(ref.row, 1).to_pylist()[0]
                assert layout == "manifest" or row["audio"]["bytes"] == row["id"].encode()
                read.append(row["id"])
        assert sorted(read) == names


# What may be wrong.


def test_a_tar_that_was_cut_off_is_named(rows, tmp_path):
    in_tar(tmp_path, rows, shards=1)
    path = tmp_path / "00000.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        places = [member.offset for member in tar]
    fourth = places[4]  # where a header begins: there, and within it, tarfile itself sees the end of the tar
    damaged = [whole[:size] for size in (len(whole) // 2, fourth, fourth + 300, 700, 300, 0)]
    damaged += [whole[:fourth] + bytes(512) + whole[fourth + 512 :], whole[: fourth + 9] + b"x" + whole[fourth + 10 :]]
    damaged += [whole + whole]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(UserError, match="00000.tar' is no whole tar file that is not compressed"):
            opened(tmp_path)
    path.unlink()
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        add(tar, "a.flac", rows[0]["bytes"])
    with pytest.raises(UserError, match=r"a.tar.gz' is no whole tar file that is not compressed .*unpack a .gz"):
        opened(tmp_path)
    in_json_files(tmp_path, rows)  # beside audio it is what that came from
    assert int(opened(tmp_path).rows_per_group.sum()) == 5


def test_odd_members_of_a_tar(rows, tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add(tar, "a/one.flac", rows[0]["bytes"])
        add(tar, "a/one.json", b'{"text": "said"}')
        add(tar, "a/._one.flac", b"of macOS")
        add(tar, "two.json", b'{"text": "without audio"}')
        add(tar, "three.FLAC", rows[1]["bytes"])  # without JSON
        add(tar, "four.mp3", rows[2]["bytes"])
        add(tar, "four.json", b"{no JSON")
        add(tar, "five.flac", rows[3]["bytes"])
        add(tar, "five.txt", "von einer Datei für Text".encode())
        add(tar, "five.cls", b"7")
        add(tar, "v1.0_six.flac", rows[3]["bytes"])
        add(tar, "v1.0_six.json", b'{"text": "with a point in its name", "speaker": "\\ud800"}')
        add(tar, "eight.flac", rows[3]["bytes"])
        add(tar, "eight.json", DEEP.encode())
        link = tarfile.TarInfo("seven.flac")
        link.type, link.linkname = tarfile.LNKTYPE, "five.flac"
        tar.addfile(link)
    clips = clips_of(opened(tmp_path))
    good = [clip for clip in clips if isinstance(clip, AudioClip)]
    assert [clip.name for clip in good] == ["a/one", "three", "five", "seven"]
    assert [clip.text for clip in good] == ["said", None, "von einer Datei für Text", None]
    two, four, six, eight = [clip for clip in clips if isinstance(clip, SkippedClip)]
    assert two.reason == "no audio" and six.reason == "damaged row" and "cannot be stored ('utf-8'" in six.message
    assert eight.reason == "damaged row" and "nested too deeply" in eight.message
    (eight,) = (clip for clip in clips_of(opened(tmp_path, "text"), with_text=True) if "'eight'" in str(clip))
    assert "nested too deeply" in eight.message
    assert four.reason == "damaged row" and "'four' cannot be used: its JSON or text cannot be read" in four.message
    with tarfile.open(tmp_path / "y.tar", "w") as tar:
        for _ in range(2):
            add(tar, "a.flac", rows[0]["bytes"])
    with pytest.raises(UserError, match="y.tar' holds 'a.flac' twice"):
        opened(tmp_path)


def test_an_index_is_made_once_and_anew_for_another_tar(rows, tmp_path, monkeypatch):
    in_tar(tmp_path, rows, shards=1)
    before = opened(tmp_path)
    monkeypatch.setattr(tar_corpus, "_rows", None)
    assert opened(tmp_path).fingerprint == before.fingerprint
    monkeypatch.undo()
    monkeypatch.setattr(tar_corpus, "HF_HOME", str(tmp_path / "cache"))
    in_tar(tmp_path, rows[:3], shards=1)
    os.utime(tmp_path / "00000.tar", ns=(1, 1))
    assert int(opened(tmp_path).rows_per_group.sum()) == 3
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(tar_corpus, "HF_HOME", str(tmp_path / "file"))  # cannot hold a folder
    assert int(opened(tmp_path).rows_per_group.sum()) == 3


def test_odd_lines_of_a_manifest(rows, tmp_path):
    place = in_parts_of_one_recording(tmp_path, rows[:2])
    lines = place.read_text().splitlines()
    odd = {
        "no JSON": "{no",
        "a list": "[1]",
        "a deep object": DEEP,
        "an offset that is none": '{"audio_filepath": "long.wav", "offset": "soon"}',
        "an offset past the end": '{"audio_filepath": "long.wav", "offset": 60, "duration": 1}',
        "a negative offset": '{"audio_filepath": "long.wav", "offset": -1}',
        "a file that is gone": '{"audio_filepath": "gone.wav"}',
        "no file": '{"text": "a"}',
    }
    place.write_text("\n".join([lines[0], *odd.values(), lines[1]]))
    clips = clips_of(opened(place), max_frames=100)
    assert [isinstance(clip, AudioClip) for clip in clips] == [True, *[False] * 8, True]
    reasons = [clip.reason for clip in clips[1:-1]]
    assert reasons == ["damaged row"] * 4 + ["past the end", "damaged row", "missing", "no audio"]
    assert "before its start of 60 s" in clips[5].message
    place.write_text('{"audio_filepath": "long.wav", "offset": 3.5, "duration": 2}')
    (short,) = clips_of(opened(place), max_frames=100)
    assert short.audio_warnings == (SHORTER,) and len(short.samples_S) == RATE // 2 and short.name == "long.wav@3.5"
    place.rename(tmp_path / "nemo.json")
    assert len(clips_of(opened(tmp_path / "nemo.json"))) == 1
    for content, message in (
        ("", "has no rows"),
        ("[]", "has neither 'audio' nor 'audio_filepath'"),
        ("x", "no JSON objects"),
    ):
        place.write_text(content)
        with pytest.raises(UserError, match=message):
            opened(place)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.csv", "file,text\na.flac,b\n", "is no table with the column file_name"),
        ("metadata.jsonl", "{no", "is no table with the column file_name"),
        ("metadata.jsonl", DEEP, "metadata.jsonl' is no table .* nested too deeply"),
        ("metadata.csv", b"\xff\xfe", "is no table with the column file_name"),
        ("a.trans.txt", b"a \xff\xfe", "is no text in UTF-8"),
    ],
)
def test_metadata_that_is_none(rows, tmp_path, name, content, message):
    (tmp_path / "a.flac").write_bytes(rows[0]["bytes"])
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        opened(tmp_path)


def test_folders_with_links_and_odd_files(rows, tmp_path):
    in_json_files(tmp_path, rows[:3])
    (tmp_path / "again").symlink_to(tmp_path, target_is_directory=True)  # in a circle
    (tmp_path / f"{rows[0]['name']}.json").write_text("{no")
    (tmp_path / f"{rows[1]['name']}.json").write_text(DEEP)
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "gone.wav").symlink_to(tmp_path / "nowhere.wav")
    (tmp_path / "notes.txt").write_text("no audio")
    (tmp_path / "._x.trans.txt").write_bytes(b"\xff")
    clips = clips_of(opened(tmp_path))
    reasons = [clip.reason for clip in clips if isinstance(clip, SkippedClip)]
    assert len(clips) == 5 and sorted(reasons) == ["damaged row", "damaged row", "empty", "missing"]
    assert [clip.text for clip in clips if isinstance(clip, AudioClip)] == [rows[2]["text"]]


def test_metadata_above_its_files_as_common_voice_has_it(rows, tmp_path):
    (tmp_path / "clips").mkdir()
    for row in rows:
        (tmp_path / "clips" / f"{row['name']}.flac").write_bytes(row["bytes"])
    lines = [f'clips/{row["name"]}.flac,"{row["text"]}"' for row in rows]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,text", *lines]), encoding="utf-8-sig")
    corpus = opened(tmp_path, text_column="text")
    assert [clip.text for clip in clips_of(corpus)] == [row["text"] for row in rows]


@pytest.mark.parametrize(
    "layout", ["folder with metadata", "LibriSpeech", "folder with JSON", "tar", "manifest", "Arrow"]
)
def test_other_texts_are_another_corpus(rows, layout, tmp_path):
    """A run that was begun goes on with the texts that it was begun with, or not at all."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    text = (
        "{} more" if layout in ("folder with JSON", "tar") else "{:.3}" + "x"
    )  # of the first two only sizes are known
    other = [row | {"text": text.format(row["text"])} for row in rows]
    before = opened(LAYOUTS[layout](tmp_path / "a", rows))
    assert opened(LAYOUTS[layout](tmp_path / "b", other)).fingerprint != before.fingerprint


@pytest.mark.parametrize("layout", ["folder with metadata", "LibriSpeech", "tar", "manifest"])
def test_corpora_lie_on_any_file_system(rows, layout, tmp_path):
    place = LAYOUTS[layout](tmp_path, rows)
    memory = fsspec.filesystem("memory")
    memory.put(str(place), f"/formats_{layout.replace(' ', '_')}/x" + place.suffix, recursive=True)
    remote = f"memory://formats_{layout.replace(' ', '_')}/x{place.suffix}"
    if layout == "manifest":
        for row in rows:
            memory.pipe_file(f"/formats_manifest/{row['name']}.flac", row["bytes"])
    expected, found = clips_of(opened(place), max_frames=100), clips_of(opened(remote), max_frames=100)
    for clip, other in zip(expected, found, strict=True):
        assert np.array_equal(clip.samples_S, other.samples_S)
        assert (clip.name, clip.text, clip.speaker) == (other.name, other.text, other.speaker)


def test_many_small_files_are_one_listing(tmp_path):
    """Nothing is opened but what is read; config/README.md says how long 100,000 take."""
    for number in range(2_000):
        folder = tmp_path / str(number // 1000)
        folder.mkdir(exist_ok=True)
        (folder / f"{number}.wav").touch()
    corpus = opened(tmp_path)
    assert int(corpus.rows_per_group.sum()) == 2_000 and corpus.read_group(19).num_rows == 100


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "OPUS", "MP3"])
def test_a_part_of_a_recording_is_a_part_of_its_samples(rows, tmp_path, kind):
    samples = np.concatenate([row["samples"] for row in rows])
    both = np.stack([samples, samples // 2], axis=1)
    form, subtype = ("OGG", "OPUS") if kind == "OPUS" else (kind, None)
    soundfile.write(tmp_path / "a", both, RATE, format=form, subtype=subtype)
    whole = read_audio(tmp_path / "a", RATE).samples_S
    part = read_audio(tmp_path / "a", RATE, start_seconds=1.5, max_seconds=2.0)
    assert np.array_equal(part.samples_S.numpy(), whole[36_000:84_000].numpy()) and part.is_cut
    other = read_audio(tmp_path / "a", 16_000, start_seconds=1.5, max_seconds=2.0).samples_S
    of_whole = read_audio(tmp_path / "a", 16_000).samples_S[24_000:56_000]
    assert len(other) == 32_000 and torch.allclose(
        other[400:-400], of_whole[400:-400], atol=1e-4
    )  # but for its borders
    for start in (1, 777, 40_001, 50_001, 123_456):
        part = read_audio(tmp_path / "a", RATE, start_seconds=start / RATE, max_seconds=0.5)
        assert np.array_equal(part.samples_S.numpy(), whole[start : start + 12_000].numpy())
    last = read_audio(tmp_path / "a", RATE, start_seconds=9.5)
    assert np.array_equal(last.samples_S.numpy(), whole[228_000:].numpy()) and not last.is_cut
    with pytest.raises(AudioError, match="before its start of 11 s"):
        read_audio(tmp_path / "a", RATE, start_seconds=11)


# Long recordings, and what is left out.


@given(
    seconds=st.floats(0.5, 60),
    max_seconds=st.floats(1, 10),
    pauses=st.lists(st.tuples(st.floats(0, 60), st.floats(0.2, 1.0)), max_size=12),
)
@costly(max_examples=60)
def test_cuts_lie_in_pauses_and_lose_nothing(seconds, max_seconds, pauses):
    rate = 1000
    samples_S = torch.rand(round(seconds * rate), generator=torch.Generator().manual_seed(0)) + 0.5
    for start, length in pauses:
        samples_S[round(start * rate) : round((start + length) * rate)] = 0
    ends = split_at_pauses(samples_S, rate, max_seconds)
    starts = [0, *ends[:-1]]
    assert ends[-1] == len(samples_S) and all(end > start for start, end in zip(starts, ends, strict=True))
    longest = int(max_seconds * rate)
    for start, end in zip(starts[:-1], ends[:-1], strict=True):
        assert longest // 2 <= end - start <= longest
        window_S = samples_S[start + longest // 2 : start + longest]
        hops = window_S[: len(window_S) // 20 * 20].view(-1, 20).abs().sum(dim=1)
        if len(hops) >= 10 and (hops.unfold(0, 10, 1).sum(dim=1) == 0).any():  # there is a pause to cut in
            assert samples_S[end] == 0
    assert ends[-1] - starts[-1] <= longest


def test_long_recordings_are_split_and_nothing_is_lost(rows, tmp_path, monkeypatch):
    """In pieces and as a whole, and on two ranks, the clips are the same and their sum the recording."""
    pause = np.zeros(RATE // 2, np.int16)
    samples = np.concatenate([part for row in rows for part in (row["samples"], pause)])
    (tmp_path / "in").mkdir()
    soundfile.write(tmp_path / "in" / "long.flac", samples, RATE)
    soundfile.write(tmp_path / "in" / "short.flac", rows[0]["samples"], RATE)
    (tmp_path / "in" / "metadata.csv").write_text("file_name,text\nlong.flac,too much\nshort.flac,said\n")
    flags = ("--long_recordings", "split", "--max_audio_seconds", 3)
    done = tokenize(tmp_path / "in", tmp_path / "out", *flags, nproc=2)
    assert done.returncode == 0, done.output[-2000:]
    found = pq.read_table(sorted((tmp_path / "out").glob("shard-*.parquet"))).to_pylist()
    parts, (short,) = [row for row in found if "long" in row["id"]], [row for row in found if row["id"] == "short"]
    assert [row["id"] for row in parts] == [f"long_{number:05d}" for number in range(len(parts))] and len(parts) >= 5
    assert sum(row["duration"] for row in parts) == pytest.approx(len(samples) / RATE, abs=1e-3)
    assert all(row["duration"] <= 3 and row["text"] is None for row in parts)
    assert [row["is_cut"] for row in parts] == [True] * (len(parts) - 1) + [False]
    assert short["text"] == "said" and not short["is_cut"]
    for at_once in (4.0, 3600.0):
        monkeypatch.setattr(clip_readers, "SECONDS_AT_ONCE", at_once)
        corpus = opened(tmp_path / "in")
        reader = AudioReader(corpus, sample_rate_hz=RATE, frame_size=1920, max_frames=37, splits=True)
        read = reader.clips(corpus.read_group(0), ClipRef(0, 0, 0, 0, 0))
        assert np.array_equal(np.concatenate([clip.samples_S for clip in read]), samples.astype(np.float32) / 32768)
        assert all(clip.is_cut for clip in read[:-1]) and not read[-1].is_cut
        assert all(clip.samples_S[-1] == 0 for clip in read[:-1])  # in a pause


def test_a_recording_with_a_hole_is_skipped(rows, tmp_path, monkeypatch):
    """A page of an Ogg file that is lost makes it shorter than its times say."""
    samples = np.concatenate([row["samples"] for row in rows])
    stream = io.BytesIO()
    soundfile.write(stream, samples, RATE, format="OGG", subtype="VORBIS")
    pages = stream.getvalue().split(b"OggS")[1:]
    assert len(pages) > 12
    (tmp_path / "a.ogg").write_bytes(b"".join(b"OggS" + page for number, page in enumerate(pages) if number != 6))
    monkeypatch.setattr(clip_readers, "SECONDS_AT_ONCE", 2.0)
    corpus = opened(tmp_path)
    reader = AudioReader(corpus, sample_rate_hz=RATE, frame_size=1920, max_frames=12, splits=True)
    (clip,) = reader.clips(corpus.read_group(0), ClipRef(0, 0, 0, 0, 0))
    assert isinstance(clip, SkippedClip) and clip.reason == "breaks off" and clip.message.startswith("'a' ends before")


def test_what_is_not_wanted_is_counted_by_name(rows, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number, row in enumerate(rows):
            seconds = [2.0, 2.0, 1.0, 0.5, 2.0][number]
            stream = io.BytesIO()
            soundfile.write(stream, row["samples"][: round(seconds * RATE)], RATE, format="FLAC")
            add(tar, f"{number}.flac", stream.getvalue())
            values = {"language": "de" if number == 1 else "en", "dnsmos": 3.0 + number / 10}
            add(tar, f"{number}.json", json.dumps(values if number < 4 else {"language": "en"}).encode())
    flags = ("--min_seconds", 0.6, "--max_seconds", 2.5, "--where", 'language in ("en", "fr") and not dnsmos < 3')
    done = tokenize(tmp_path, tmp_path.parent / f"{tmp_path.name}_out", *flags)
    assert done.returncode == 0, done.output[-2000:]
    found = json.loads((tmp_path.parent / f"{tmp_path.name}_out" / "manifest.json").read_text())
    assert found["clips"] == 2 and found["skipped"] == {}
    assert found["filtered"] == {f"not {flags[-1]}": 1, "under 0.6 s": 1, "no dnsmos": 1}
    for mistake, message in (
        (("--where", "score > 3"), "has no column 'score'"),
        (("--where", "len(text) > 3"), "it compares columns with numbers and texts"),
        (("--max_seconds", 500), "--max_seconds is 500; it lies between"),
        (("--min_seconds", 500), "--min_seconds is 500; it lies between 0 and"),
        (("--max_seconds", 2, "--long_recordings", "split"), "choose one"),
    ):
        done = tokenize(tmp_path, tmp_path.parent / f"{tmp_path.name}_no", *mistake)
        assert done.returncode == 1 and message in done.output and "Traceback" not in done.output


def test_duplicates_are_counted_and_left_out(rows, tmp_path):
    """The same samples in another file, under another name and in another shard; the first in order stays."""
    wav = io.BytesIO()
    soundfile.write(wav, rows[1]["samples"], RATE, format="WAV")
    names = {"a0": rows[0], "a1": rows[1], "a2": rows[2], "b1": rows[1] | {"bytes": wav.getvalue()}, "b0": rows[0]}
    (tmp_path / "in").mkdir()
    for number, (name, row) in enumerate(names.items()):
        with tarfile.open(tmp_path / "in" / f"{number}.tar", "w") as tar:
            add(tar, f"{name}.flac", row["bytes"])
            add(tar, f"{name}.json", json.dumps(said(row)).encode())
    flags = ("--clips_per_shard", 1)

    def made(folder, nproc, *more):
        done = tokenize(tmp_path / "in", tmp_path / folder, *flags, *more, nproc=nproc)
        assert done.returncode == 0, done.output[-2000:]
        found = json.loads((tmp_path / folder / "manifest.json").read_text())
        stored = pq.read_table(sorted((tmp_path / folder).glob("shard-*.parquet"))).to_pylist()
        assert found["clips"] == len(stored) == sum(number for number, _ in found["by_second"])
        assert found["hours"] * 3600 == pytest.approx(sum(row["duration"] for row in stored))
        return found, stored

    kept, everything = made("kept", 1)
    assert kept["duplicates_kept"] == 2 and kept["clips"] == 5 and kept["filtered"] == {}
    dropped, stored = made("dropped", 2, "--duplicates", "drop")
    assert dropped["duplicates_kept"] == 0 and dropped["filtered"] == {"duplicate": 2}
    assert [row["id"] for row in stored] == ["a0", "a1", "a2"] and stored == everything[:3]
    (tmp_path / "dropped" / "manifest.json").unlink()  # as if it had been killed before the end
    (tmp_path / "dropped" / "shard-000004.parquet").unlink()
    assert made("dropped", 1, "--duplicates", "drop") == (dropped, stored)
    (tmp_path / "dropped" / "shard-000000.parquet").unlink()  # which holds the first of one
    assert made("dropped", 1, "--duplicates", "drop") == (dropped, stored)
    done = tokenize(tmp_path / "in", tmp_path / "dropped", *flags)
    assert done.returncode == 1 and "made with duplicates = 'drop', but it is 'keep' now" in done.output
    made("damaged", 1)
    plan = json.loads((tmp_path / "damaged" / "tokenization.json").read_text()) | {"duplicates": "drop"}
    shard = tmp_path / "damaged" / "shard-000003.parquet"  # is made anew without its clip
    content = bytearray(shard.read_bytes())
    content[content.index(b"PAR1", 0) + 60] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match="shard-000003.parquet"):
        settle_duplicates(str(tmp_path / "damaged"), plan)
    assert shard.read_bytes() == content


@pytest.mark.parametrize(
    ("where", "values", "kept"),
    [
        ("a == 1", {"a": 1}, True),
        ("a == 1", {"a": "1"}, True),  # tables of text have numbers as text
        ("a == '007'", {"a": "7"}, False),
        ("2 < a <= 3", {"a": "3.0"}, True),
        ("2 < a <= 3", {"a": 2}, False),
        ("not a == 'x' or b > 1", {"a": "x", "b": 2}, True),
        ("a in ('x', 'y') and b != 0", {"a": "y", "b": 0}, False),
        ("a not in [1, 2]", {"a": 3}, True),
        ("a > -1", {"a": 0}, True),
        ("a in (1, 2)", {"a": "1"}, True),
        ("a not in ('1', '2')", {"a": "1"}, False),
        ("a < b", {"a": "9", "b": "10"}, False),
        ("a == 1", {"a": "en"}, False),
        ("a > 1", {"a": "en"}, False),
        (" a == True", {"a": True}, True),
        ("a == 'x'", {"a": ""}, False),
        ("a == 'x'", {"a": None}, False),
    ],
)
def test_conditions(where, values, kept):
    rule = RowFilter(where=where)
    assert rule.columns == {f"filter/{name}": name for name in values}
    assert (rule.of_values({f"filter/{name}": value for name, value in values.items()}) is None) == kept


@pytest.mark.parametrize(
    "where",
    [
        "a",
        "a = 1",
        "a +1 > 2",
        "f(a)",
        "a.b == 1",
        "__import__('os') == 1",
        "(a == 1",
        "",
        "a is 1",
        "a < None",
        "x in 5",
        "a in {[1]}",
    ],
)
def test_conditions_that_are_none(where):
    with pytest.raises(UserError, match="--where is"):
        RowFilter(where=where)


def test_conditions_compare_texts_as_texts_and_class_labels_by_name(rows, tmp_path):
    speakers = ["007", "7", "7e0", 7, None]
    lines = [json.dumps({"audio_filepath": f"{i}.flac", "speaker": name}) for i, name in enumerate(speakers)]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    labelled = dataset(rows).remove_columns("speaker").add_column("speaker", [0, 1, 1, 0, -1])
    labelled.cast_column("speaker", ClassLabel(names=["5", "007"])).save_to_disk(str(tmp_path / "d"))
    rule = RowFilter(where="speaker == '007'")
    for place, kept in ((tmp_path / "m.jsonl", [0]), (tmp_path / "d", [1, 2])):
        corpus = open_corpus(str(place), None, "audio", None, rule.columns)
        assert [i for i, row in enumerate(corpus.read_group(0).to_pylist()) if rule.of_values(row) is None] == kept
