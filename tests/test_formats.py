"""Corpus formats: the same clips in every format, and one sentence for damaged files."""

import io
import itertools
import json
import subprocess
import tarfile
import unicodedata
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
from layouts import LAYOUTS, add, dataset, in_json_files, in_parts_of_one_recording, lossless_rows
from test_code_store import tokenize

from llama_mimi.audio.reading import SHORTER, AudioError, read_audio
from llama_mimi.audio.silence import split_at_pauses
from llama_mimi.common.errors import UserError
from llama_mimi.corpora.clips import AudioReader, CodedClip, SkippedClip
from llama_mimi.corpora.formats import open_source
from llama_mimi.corpora.where import RowFilter

RATE = 24_000
COLUMNS = {"text": "text", "speaker": "speaker"}
DEEP = f'{{"text": {"[" * 100_000}{"]" * 100_000}}}'  # json raises a RecursionError


@pytest.fixture(scope="module")
def rows():
    """Return five clips as lossless files, with text and speaker."""
    found = lossless_rows(str(TINY / "corpus" / "validation-*.parquet"), 5, 2.0)
    return [row | {"samples": soundfile.read(io.BytesIO(row["bytes"]), dtype="int16")[0]} for row in found]


def opened(path, text_column=None, split=None, where=None):
    return open_source(str(path), None, "audio", text_column, COLUMNS | RowFilter(where=where).columns, split)


def clips_of(source, max_frames=12, **options):
    reader = AudioReader(source, sample_rate_hz=RATE, frame_size=1920, max_frames=max_frames, **options)
    return [clip for row in rows_of(source) for clip in reader.clips(row)]


def rows_of(source):
    return [row for unit in range(len(source.units)) for row in source.rows(unit)]


def encoded(samples, kind="FLAC", subtype=None):
    stream = io.BytesIO()
    soundfile.write(stream, samples, RATE, format=kind, subtype=subtype)
    return stream.getvalue()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_clips_in_every_layout(rows, layout, tmp_path):
    """All layouts give equal samples, texts, speakers, names and cuts, also if reading begins inside a unit."""
    place = LAYOUTS[layout](tmp_path, rows)
    source = opened(place)
    assert {"audio", "text", "speaker"} <= set(source.columns)
    by_name = {Path(clip.name).name: clip for clip in clips_of(source, max_frames=100)}
    assert by_name.keys() == {row["name"] for row in rows}
    for row in rows:
        clip = by_name[row["name"]]
        assert np.array_equal(clip.samples_S, read_audio(row["bytes"], RATE).samples_S.numpy())
        assert clip.text == row["text"] and not clip.is_cut
        assert clip.speaker == (row["name"][0] if layout == "LibriSpeech" else row["speaker"])
    assert all(clip.is_cut and len(clip.samples_S) == 12 * 1920 for clip in clips_of(source))
    for unit, start in itertools.product(range(len(source.units)), (1, 2, 9)):
        assert list(source.rows(unit, start)) == list(source.rows(unit))[start:]
    again = opened(place)
    assert again.fingerprint == source.fingerprint and again.units == source.units
    with_text = open_source(str(place), None, "audio", "text")
    assert all(isinstance(clip, CodedClip) and clip.text for clip in clips_of(with_text, with_text=True))
    with pytest.raises(UserError, match="lacks the column 'said' for the text .columns: .*text"):
        open_source(str(place), None, "audio", "said")
    if layout == "tar":
        with pytest.raises(UserError, match="training cannot read the tar files of .*; run scripts/tokenize_corpus.py"):
            _ = AudioReader(source, sample_rate_hz=RATE, frame_size=1920, max_frames=12).rows_per_unit


def test_splits_of_saved_datasets(rows, tmp_path):
    DatasetDict(train=dataset(rows), test=dataset(rows[:2])).save_to_disk(str(tmp_path))
    with pytest.raises(UserError, match="contains the splits train, test; set data.split"):
        opened(tmp_path)
    assert len(rows_of(opened(tmp_path, split="test"))) == 2
    with pytest.raises(UserError, match="the split 'dev' does not exist: .* contains the splits train, test; set one"):
        opened(tmp_path, split="dev")
    with pytest.raises(UserError, match="the dataset 'hf:nobody/nothing' could not be loaded"):
        opened("hf:nobody/nothing")


# Small corpora of other programs. Each case has the files, and either the expected clips (name, and text or the reason
# for skipping) or the expected error.

CLIP = encoded(np.sin(np.arange(4800) / 10) / 2)
NFD = unicodedata.normalize("NFD", "café")
FOLDERS = {
    "dot slash": ({"c.flac": CLIP, "metadata.csv": "file_name,text\n./c.flac,words\n"}, [("c", "words")]),
    "backslash": ({"a/c.flac": CLIP, "metadata.csv": "file_name,text\na\\c.flac,words\n"}, [("a/c", "words")]),
    "NFD": ({f"{NFD}.flac": CLIP, "metadata.csv": "file_name,text\ncafé.flac,words\n"}, [(NFD, "words")]),
    "BOM above": ({"a/c.flac": CLIP, "metadata.csv": "\ufefffile_name,text\na/c.flac,words\n"}, [("a/c", "words")]),
    "NaN is a text": ({"c.flac": CLIP, "metadata.csv": "file_name,text\nc.flac,NaN\n"}, [("c", "NaN")]),
    "LJSpeech": ({"wavs/L.flac": CLIP, "metadata.csv": 'L|Say "a|say a\n'}, [("wavs/L", 'Say "a')]),
    "other files": (
        {"c.flac": CLIP, "metadata.csv": "file_name,text\nd.flac,words\n"},
        r"in the tables of .* do not match its audio files \(c.flac, .*d.flac\)",
    ),
    "file twice": (
        {"c.flac": CLIP, "metadata.csv": "file_name,text\nc.flac,a\n./c.flac,b\n"},
        "two rows are for './c.flac'",
    ),
    "open quote": (
        {"c.flac": CLIP, "d.flac": CLIP, "metadata.csv": 'file_name,text\nc.flac,"a\nd.flac,b\n'},
        "metadata.csv' is not a table with the column file_name .*unexpected end of data",
    ),
    "comma in a text": (
        {"c.flac": CLIP, "metadata.csv": "file_name,text\nc.flac,well, yes\n"},
        "line for 'c.flac' has more fields than the header",
    ),
    "another header": ({"c.flac": CLIP, "metadata.csv": "file,text\nc.flac,b\n"}, "with the column file_name"),
    "deep JSON table": (
        {"c.flac": CLIP, "metadata.jsonl": DEEP},
        "metadata.jsonl' is not a table .* nested too deeply",
    ),
    "another encoding": ({"c.flac": CLIP, "c.trans.txt": b"c \xff\xfe"}, "c.trans.txt' is not a table in UTF-8"),
    "NaN in a manifest": (
        {"c.flac": CLIP, "m.jsonl": '{"audio_filepath": "c.flac", "text": NaN, "speaker": NaN, "offset": NaN}'},
        [("c.flac", None)],
    ),
    "audio object": ({"c.flac": CLIP, "m.jsonl": '{"audio": {"path": "c.flac"}, "text": "a"}'}, [("c.flac", "a")]),
    "audio bytes in JSON": ({"m.jsonl": '{"audio": {"bytes": "UklGRg=="}, "text": "a"}'}, ["damaged row"]),
    "duration of 0": ({"c.flac": CLIP, "m.jsonl": '{"audio_filepath": "c.flac", "duration": 0}'}, ["too short"]),
    "odd lines": (
        {
            "c.flac": CLIP,
            "m.jsonl": '{"audio_filepath": "c.flac"}\n{no\n[1]\n{"audio_filepath": "c.flac", "offset": "soon"}\n'
            '{"audio_filepath": "c.flac", "offset": 60, "duration": 1}\n{"audio_filepath": "c.flac", "offset": -1}\n'
            '{"audio_filepath": "gone.wav"}\n{"text": "a"}\n' + DEEP,
        },
        [("c.flac", None), *["damaged row"] * 3, "past the end", "damaged row", "missing", "no audio", "damaged row"],
    ),
    "empty manifest": ({"m.jsonl": "\n"}, "has no rows"),
    "manifest of a list": ({"m.jsonl": "[]"}, "lacks the column 'audio' for the audio .columns: none"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders_and_manifests_of_other_programs(case, tmp_path):
    files, wanted = FOLDERS[case]
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    is_right(tmp_path / "m.jsonl" if "m.jsonl" in files else tmp_path, wanted)


def is_right(place, wanted):
    if isinstance(wanted, str):
        with pytest.raises(UserError, match=f"^[^\n]*{wanted}[^\n]*$"):
            clips_of(opened(place))
    else:
        clips = clips_of(opened(place))
        assert [(c.name, c.text) if isinstance(c, CodedClip) else c.reason for c in clips] == wanted


def link(name, target):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.LNKTYPE, target
    return member


def cut_at_a_header(content):
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return content[: tar.getmembers()[2].offset]


def damaged_in_the_middle(content):
    at = len(cut_at_a_header(content))
    return content[: at + 9] + b"x" + content[at + 10 :]


TWO = [("a.flac", CLIP), ("a.txt", b"one"), ("b.flac", CLIP), ("b.txt", b"two")]
NOT_WHOLE = "x.tar' is not a readable tar file, or is compressed"
TARS = {
    "names in Latin-1": ([("caf\udce9.flac", CLIP), ("caf\udce9.txt", b"words")], [("caf\\xe9", "words")]),
    "text with BOM": ([("a.flac", CLIP), ("a.txt", b"\xef\xbb\xbfwords\n")], [("a", "words")]),
    "fields of two parts": (
        [("a.audio.flac", CLIP), ("a.transcript.txt", b"words"), ("a.meta.json", b"{}")],
        [("a.audio", None), "damaged row", "damaged row"],
    ),
    "names that differ after the first dot": (
        [("t.2020.001.flac", CLIP), ("t.2020.001.txt", b"one"), ("t.2020.002.flac", CLIP), ("t.2020.002.txt", b"two")],
        [("t.2020.001", "one"), ("t.2020.002", "two")],
    ),
    "hard link": ([*TWO[:2], link("c.flac", "a.flac"), ("c.txt", b"same")], [("a", "one"), ("c", "same")]),
    "link to nothing": ([*TWO, link("c.flac", "gone.flac")], NOT_WHOLE),
    "members of a row apart": ([TWO[0], *TWO[2:], TWO[1]], "the members of 'a' are not adjacent; sort"),
    "member twice": ([TWO[0], *TWO], "contains two audio files with the name 'a'"),
    "cut at a header": (TWO, NOT_WHOLE, cut_at_a_header),
    "cut in a header": (TWO, NOT_WHOLE, lambda content: content[: len(cut_at_a_header(content)) + 300]),
    "cut in a member": (TWO, NOT_WHOLE, lambda content: content[:700]),
    "header damaged in the middle": (TWO, NOT_WHOLE, damaged_in_the_middle),
    "first header damaged": (TWO, NOT_WHOLE, lambda content: b"x" * 99 + content),
    "two tars in one": (TWO, NOT_WHOLE, lambda content: content + content),
    "no bytes": (TWO, NOT_WHOLE, lambda content: b""),
    "no members": ([], "has no rows"),
    "odd members": (
        [
            *[("a/one.flac", CLIP), ("a/._one.flac", b"macOS"), ("a/one.json", b'{"text": "said"}')],
            *[("two.json", b"{}"), ("three.FLAC", CLIP), ("four.mp3", CLIP), ("four.json", b"{no JSON")],
            *[("five.flac", CLIP), ("five.cls", b"7"), ("six.flac", CLIP), ("six.json", b'{"speaker": "\\ud800"}')],
            *[("seven.flac", CLIP), ("seven.json", DEEP.encode())],
        ],
        [("a/one", "said"), "damaged row", ("three", None), "damaged row", ("five", None), *["damaged row"] * 2],
    ),
}


@pytest.mark.parametrize("case", TARS)
def test_tars_of_other_programs(case, tmp_path):
    members, wanted, *damage = TARS[case]
    with tarfile.open(tmp_path / "x.tar", "w", encoding="utf-8", errors="surrogateescape") as tar:
        for member in members:
            tar.addfile(member) if isinstance(member, tarfile.TarInfo) else add(tar, *member)
    for change in damage:
        (tmp_path / "x.tar").write_bytes(change((tmp_path / "x.tar").read_bytes()))
    is_right(tmp_path, wanted)
    if wanted == "has no rows":  # but an empty tar among other tars is accepted
        with tarfile.open(tmp_path / "y.tar", "w") as tar:
            add(tar, "a.flac", CLIP)
        is_right(tmp_path, [("a", None)])


def test_compressed_and_sparse_tars(rows, tmp_path):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        add(tar, "a.flac", CLIP)
    is_right(tmp_path / "a.tar.gz", "a.tar.gz' is not a readable tar file, or is compressed")
    (tmp_path / "in").mkdir()
    wav = encoded(np.concatenate([rows[0]["samples"], np.zeros(3 * RATE, np.int16), rows[1]["samples"]]), "WAV")
    size, end = 2 * len(rows[0]["samples"]), len(wav) - 2 * len(rows[1]["samples"])
    with (tmp_path / "in" / "a.wav").open("wb") as file:  # a sparse file: the zeros are not written
        file.write(wav[: size + 44])
        file.seek(end)
        file.write(wav[end:])
    (tmp_path / "in" / "b.flac").write_bytes(CLIP)
    subprocess.run(["tar", "--sparse", "-cf", tmp_path / "x.tar", "-C", tmp_path / "in", "a.wav", "b.flac"], check=True)
    assert (tmp_path / "x.tar").stat().st_size < len(wav)
    a, b = rows_of(opened(tmp_path / "x.tar"))
    assert a["audio"] == wav and b["audio"] == CLIP


def test_a_part_that_is_shorter_than_its_duration_has_a_warning(rows, tmp_path):
    place = in_parts_of_one_recording(tmp_path, rows[:2])
    place.write_text('{"audio_filepath": "long.wav", "offset": 3.5, "duration": 2}')
    (short,) = clips_of(opened(place), max_frames=100)
    assert (short.name, short.is_cut, short.audio_warnings) == ("long.wav@3.5", True, (SHORTER,))
    assert len(short.samples_S) == RATE // 2
    (short,) = clips_of(opened(place), max_frames=100, splits=True, row_filter=RowFilter(max_seconds=9))
    assert short.audio_warnings == (SHORTER,) and short.is_cut
    place.rename(tmp_path / "nemo.json")
    assert len(clips_of(opened(tmp_path / "nemo.json"))) == 1


def test_folders_with_links_and_odd_files(rows, tmp_path, capsys):
    in_json_files(tmp_path, rows[:3])
    (tmp_path / "again").symlink_to(tmp_path, target_is_directory=True)  # a cycle
    (tmp_path / f"{rows[0]['name']}.json").write_text("{no")
    (tmp_path / f"{rows[1]['name']}.json").write_text(DEEP)
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "gone.wav").symlink_to(tmp_path / "nowhere.wav")
    (tmp_path / "notes.txt").write_text("no audio")
    (tmp_path / "._x.trans.txt").write_bytes(b"\xff")
    clips = clips_of(opened(tmp_path))
    reasons = [clip.reason for clip in clips if isinstance(clip, SkippedClip)]
    assert len(clips) == 5 and sorted(reasons) == ["damaged row", "damaged row", "empty", "missing"]
    assert [clip.text for clip in clips if isinstance(clip, CodedClip)] == [rows[2]["text"]]
    assert not capsys.readouterr().out
    (tmp_path / "metadata.csv").write_text("file_name,text\nempty.wav,a\nother.wav,b\n")
    opened(tmp_path)
    message = "4 audio files lack a row, and 1 rows lack an audio file"
    assert message in (line := capsys.readouterr().out) and "gone" not in line and "other.wav" in line


@pytest.mark.parametrize(
    "layout", ["folder with metadata", "LibriSpeech", "folder with JSON", "tar", "manifest", "Arrow"]
)
def test_other_texts_are_another_corpus(rows, layout, tmp_path):
    """A changed text changes the fingerprint of the corpus, so a run cannot be resumed with other texts."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    text = "{} more" if layout == "folder with JSON" else "{:.3}x"  # JSON files are compared by size only
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


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "OPUS", "MP3"])
def test_a_part_of_a_recording_is_a_part_of_its_samples(rows, tmp_path, kind):
    samples = np.concatenate([row["samples"] for row in rows])
    both = np.stack([samples, samples // 2], axis=1)
    form, subtype = ("OGG", "OPUS") if kind == "OPUS" else (kind, None)
    content = encoded(both, form, subtype)
    whole = read_audio(content, RATE).samples_S
    part = read_audio(content, RATE, start_seconds=1.5, max_seconds=2.0)
    assert part.samples_S.equal(whole[36_000:84_000]) and part.is_cut
    other = read_audio(content, 16_000, start_seconds=1.5, max_seconds=2.0).samples_S
    of_whole = read_audio(content, 16_000).samples_S[24_000:56_000]
    assert torch.allclose(other[400:-400], of_whole[400:-400], atol=1e-4) and len(other) == 32_000  # except at the ends
    for start in (1, 40_001, 123_456):
        part = read_audio(content, RATE, start_seconds=start / RATE, max_seconds=0.5)
        assert part.samples_S.equal(whole[start : start + 12_000])
    last = read_audio(content, RATE, start_seconds=9.5)
    assert last.samples_S.equal(whole[228_000:]) and not last.is_cut
    with pytest.raises(AudioError, match="starts at 11 s, after the end"):
        read_audio(content, RATE, start_seconds=11)


# Long recordings, filters and duplicates


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
        if len(hops) >= 10 and (hops.unfold(0, 10, 1).sum(dim=1) == 0).any():  # the window contains a pause
            assert samples_S[end] == 0
    assert ends[-1] - starts[-1] <= longest


def test_long_recordings_are_split_and_nothing_is_lost(rows, tmp_path, monkeypatch):
    """The clips of a recording, concatenated, are the recording."""
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
    *read, _ = clips_of(opened(tmp_path / "in"), max_frames=37, splits=True)
    assert np.array_equal(np.concatenate([clip.samples_S for clip in read]), samples.astype(np.float32) / 32768)
    assert all(clip.samples_S[-1] == 0 for clip in read[:-1])  # the cut is in a pause
    monkeypatch.setattr("llama_mimi.corpora.clips.MAX_RECORDING_SECONDS", 5.0)
    too_long, _ = clips_of(opened(tmp_path / "in"), max_frames=37, splits=True)
    assert too_long.reason == "too long"


def test_filtered_clips_are_counted_by_reason(rows, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number, row in enumerate(rows):
            seconds = [2.0, 2.0, 1.0, 0.5, 2.0][number]
            add(tar, f"{number}.flac", encoded(row["samples"][: round(seconds * RATE)]))
            values = {"language": "de" if number == 1 else "en", "dnsmos": 3.0 + number / 10}
            add(tar, f"{number}.json", json.dumps(values if number < 4 else {"language": "en"}).encode())
    flags = ("--min_seconds", 0.6, "--max_seconds", 2.5, "--where", 'language in ("en", "fr") and not dnsmos < 3')
    done = tokenize(tmp_path, tmp_path.parent / f"{tmp_path.name}_out", *flags)
    assert done.returncode == 0, done.output[-2000:]
    found = json.loads((tmp_path.parent / f"{tmp_path.name}_out" / "manifest.json").read_text())
    assert found["clips"] == 2 and found["skipped"] == {}
    assert found["filtered"] == {f"not {flags[-1]}": 1, "under 0.6 s": 1, "no dnsmos": 1}


@pytest.mark.parametrize(
    ("where", "values", "kept"),
    [
        ("a == 1", {"a": 1}, True),
        ("a == 1", {"a": "1"}, True),  # CSV tables contain only strings
        ("a == '007'", {"a": "7"}, False),
        ("2 < a <= 3", {"a": "3.0"}, True),
        ("2 < a <= 3", {"a": 2}, False),
        ("not a == 'x' or b > 1", {"a": "x", "b": 2}, True),
        ("a in ('x', 'y') and b != 0", {"a": "y", "b": 0}, False),
        ("a not in [1, 2]", {"a": 3}, True),
        ("a in (1, 2)", {"a": "1"}, True),
        ("a not in ('1', '2')", {"a": "1"}, False),
        ("a < b", {"a": "9", "b": "10"}, False),
        ("a == 1", {"a": "en"}, False),
        (" a == True", {"a": True}, True),
        ("a == 'x'", {"a": None}, False),
    ],
)
def test_conditions(where, values, kept):
    rule = RowFilter(where=where)
    assert rule.columns == {f"filter/{name}": name for name in values}
    assert (rule.of_values({f"filter/{name}": value for name, value in values.items()}) is None) == kept
    wrong = "a|a = 1|a +1 > 2|f(a)|a.b == 1|__import__('os') == 1|(a == 1||a is 1|a < None|x in 5|a in {[1]}|a and b"
    for mistake in wrong.split("|"):
        with pytest.raises(UserError, match="--where is"):
            RowFilter(where=mistake)


def test_conditions_compare_class_labels_by_name(rows, tmp_path):
    labelled = dataset(rows).remove_columns("speaker").add_column("speaker", [0, 1, 1, 0, -1])
    labelled.cast_column("speaker", ClassLabel(names=["5", "007"])).save_to_disk(str(tmp_path))
    found, rule = rows_of(opened(tmp_path, where="speaker == '007'")), RowFilter(where="speaker == '007'")
    assert [number for number, row in enumerate(found) if rule.of_values(row) is None] == [1, 2]
