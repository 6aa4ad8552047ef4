"""Corpora of audio: found, read in workers, and nothing lost in silence."""

import contextlib
import itertools
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from conftest import ROOT, TINY
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_mimi.common.batching import prefetch_map
from llama_mimi.common.errors import UserError
from llama_mimi.data.build import build_dataloader, build_validation_dataloader
from llama_mimi.data.clip_readers import AudioClip, AudioReader, SkippedClip
from llama_mimi.data.clips import ClipStream, is_too_many
from llama_mimi.data.corpora import open_corpus
from llama_mimi.data.dataloader import DataMeter, SpeechDataLoader
from llama_mimi.data.order import RowsInOrder, ShuffledOrder
from llama_mimi.data.packing import BatchPacker
from llama_mimi.tokens.tokenizer import IGNORE_INDEX, load_speech_tokenizer
from llama_mimi.training.config_file import parse_config

RATE = 24_000
GOOD = object()


def write_corpus(folder, contents, num_files=3, rows_per_group=4, texts=None):
    """Parquet files of short clips; a content is GOOD, bytes, or None. Names are clip-000, clip-001, ..."""
    path = folder / "clip.wav"
    soundfile.write(path, torch.zeros(2000).numpy(), RATE)
    rows = [
        {
            "id": f"clip-{i:03}",
            "audio": {"bytes": path.read_bytes() if content is GOOD else content, "path": None},
            "text": texts[i] if texts else f"text {i}",
        }
        for i, content in enumerate(contents)
    ]
    struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    schema = pa.schema({"id": pa.string(), "audio": struct, "text": pa.string()})
    for k in range(num_files):
        table = pa.Table.from_pylist(rows[k::num_files], schema)
        pq.write_table(table, folder / f"train-{k}.parquet", row_group_size=rows_per_group)
    return str(folder)


def reader(corpus, text=None, max_frames=12):
    return AudioReader(
        open_corpus(corpus, None, "audio", text),
        sample_rate_hz=RATE,
        frame_size=1920,
        max_frames=max_frames,
        with_text=text is not None,
    )


def read_all(reader, dp_rank=0, dp_world_size=1, num_workers=0):
    """Every clip of one rank once, in corpus order, through the loader that training uses."""
    rows_per_group = reader.corpus.rows_per_group
    order = RowsInOrder(rows_per_group, range(len(rows_per_group)), dp_rank, dp_world_size)
    return [clip for chunk in ClipStream([reader], order, 3).load(num_workers=num_workers) for clip in chunk.clips]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"), [GOOD] * 26)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("dp_world_size", [1, 3])
def test_every_clip_once_in_corpus_order(corpus, dp_world_size, num_workers):
    ranks = [read_all(reader(corpus), rank, dp_world_size, num_workers) for rank in range(dp_world_size)]
    names = [[clip.name for clip in clips] for clips in ranks]
    expected = [f"clip-{i:03}" for k in range(3) for i in range(k, 26, 3)]  # file by file
    assert names == [expected[rank::dp_world_size] for rank in range(dp_world_size)]


def test_clips_are_cut_after_a_whole_frame(corpus):
    (clip, *_) = read_all(reader(corpus, max_frames=1))
    assert len(clip.samples_S) == 1920 and clip.is_cut
    (clip, *_) = read_all(reader(corpus, max_frames=2))
    assert len(clip.samples_S) == 2000 and not clip.is_cut


BAD = [b"", b"no audio at all", None]


def test_bad_clips_are_named(tmp_path):
    clips = read_all(reader(write_corpus(tmp_path, [GOOD] * 10 + BAD)))
    good = [clip.name for clip in clips if isinstance(clip, AudioClip)]
    assert sorted(good) == [f"clip-{i:03}" for i in range(10)]
    skipped = {clip.message.split("'")[1]: clip.reason for clip in clips if isinstance(clip, SkippedClip)}
    assert skipped == {"clip-010": "empty", "clip-011": "unreadable", "clip-012": "no audio"}


def speech_loader(corpus, codec, tokenizer, max_skip_fraction, is_packed=False, **extra):
    audio = reader(corpus)
    order = ShuffledOrder([audio.corpus], [1.0], dp_rank=0, dp_world_size=1, shuffle_window=5, seed=0)
    return SpeechDataLoader(
        [audio],
        order,
        BatchPacker(tokenizer, 2, 16, is_packed=is_packed, has_positions=is_packed),
        codec,
        dp_rank=0,
        dp_world_size=1,
        dataset=corpus,
        chunk_size=8,
        max_skip_fraction=max_skip_fraction,
        workers={},
        **extra,
    )


@pytest.mark.parametrize(
    ("num_bad", "max_skip_fraction", "stops"), [(1, 0.01, False), (3, 0.01, True), (3, 0.5, False)]
)
def test_training_stops_at_too_large_a_share(tmp_path, codec, tokenizer, num_bad, max_skip_fraction, stops):
    corpus = write_corpus(tmp_path, [GOOD] * 97 + BAD[:num_bad])
    batches = iter(speech_loader(corpus, codec, tokenizer, max_skip_fraction))
    if stops:
        with pytest.raises(UserError, match="data.max_skip_fraction"):
            for _ in range(50):
                next(batches)
    else:
        for _ in range(48):
            next(batches)


@pytest.mark.parametrize("packing", ["pad", "pack"])
@pytest.mark.parametrize("architecture", ["flattened", "hierarchical"])
def test_a_text_that_leaves_no_room_for_audio_is_skipped(tmp_path, caplog, monkeypatch, architecture, packing):
    monkeypatch.chdir(ROOT)
    corpus = write_corpus(tmp_path, [GOOD] * 4, num_files=1, texts=["the doctor", "the doctor " * 200] * 2)
    settings = {"data.task": "tts", "model.architecture": architecture, "data.packing": packing}
    settings |= {"training.dataset": corpus, "validation.dataset": corpus, "data.max_skip_fraction": 1}
    flags = [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
    job_config = parse_config(["--job.config_file", "config/tiny.toml", *flags])
    builder = load_speech_tokenizer(str(TINY / "llama"), str(TINY / "mimi"), 4, "llama", architecture)
    for build in (build_dataloader, build_validation_dataloader):
        caplog.clear()
        loader = build(1, 0, builder, job_config)
        _, labels = next(iter(loader))
        assert (labels != IGNORE_INDEX).flatten(1).any(dim=1).sum() == 2
        assert "skipped clip 1 (text too long): 'clip-00" in caplog.text and "tokens with BOS" in caplog.text


@pytest.mark.parametrize(("num_clips", "stops"), [(120, False), (40, True)])
def test_the_share_is_judged_after_a_hundred_clips_and_at_the_end(tmp_path, codec, tokenizer, num_clips, stops):
    """The first three clips are bad: 2.5 % of 120, and more than the 2.8 that 40 clips may have."""
    loader = speech_loader(write_corpus(tmp_path, BAD + [GOOD] * (num_clips - 3), 1), codec, tokenizer, 0.028)
    loader._order = RowsInOrder(loader._readers[0].corpus.rows_per_group, range(num_clips // 4))
    with pytest.raises(UserError, match="3 of 40 clips could not be used") if stops else contextlib.nullcontext():
        assert len(list(loader)) == 59  # of two clips each


@pytest.mark.parametrize(("fraction", "num_ended"), [(0.006, 0), (0.03, 8)])
def test_a_sample_with_bad_clips_by_chance_is_accepted(fraction, num_ended):
    """Each of 8 ranks reads 10,000 clips; 1 % of them may be bad."""
    bad = np.random.default_rng(0).random((8, 10_000)) < fraction
    counts = [enumerate(np.flatnonzero(of_rank) + 1, 1) for of_rank in bad]  # clips read at each bad one
    ended = [any(is_too_many(k, n, 0.01, is_end=False, is_whole=False) for k, n in of_rank) for of_rank in counts]
    assert sum(ended) == num_ended


def test_a_corpus_without_a_usable_clip_ends(tmp_path, codec, tokenizer):
    with pytest.raises(UserError, match="can be used"):
        next(iter(speech_loader(write_corpus(tmp_path, [b"no audio"] * 6), codec, tokenizer, 1.0)))


def test_counts_survive_a_checkpoint(tmp_path, codec, tokenizer):
    corpus = write_corpus(tmp_path, [GOOD] * 60 + BAD[:1])
    loader = speech_loader(corpus, codec, tokenizer, 0.5)
    batches = iter(loader)
    for _ in range(40):
        next(batches)
    again = speech_loader(corpus, codec, tokenizer, 0.5)
    again.load_state_dict(loader.state_dict())
    assert again._counts["read"] == loader._counts["read"] >= 80
    again._meter = meter = DataMeter()
    next(iter(again))
    assert (meter.num_clips, meter.num_frames) == (82, 164), "two rows of two frames a batch"


def test_a_packed_row_counts_the_frames_that_it_holds(corpus, codec, tokenizer):
    meter = DataMeter()
    batches = iter(speech_loader(corpus, codec, tokenizer, 0.0, is_packed=True, meter=meter))
    for _ in range(5):
        next(batches)
    assert meter.codec_seconds > 0
    inputs = [inputs["input"] for inputs, _ in itertools.islice(speech_loader(corpus, codec, tokenizer, 0.0, True), 5)]
    is_start = torch.cat(inputs).flatten() == tokenizer.vocabulary.audio_start_id
    is_level_0 = tokenizer.vocabulary.is_audio(torch.cat(inputs)) & (tokenizer.vocabulary.level(torch.cat(inputs)) == 0)
    assert meter.num_frames == is_level_0.sum()
    assert meter.num_clips <= is_start.sum() <= meter.num_clips + 9, (
        "each of 10 rows but the first may go on with a clip"
    )


@settings(deadline=None)
@given(num_items=st.integers(0, 12), num_ahead=st.integers(0, 5), fails_at=st.integers(0, 12))
def test_map_ahead_is_map(num_items, num_ahead, fails_at):
    """Also where the function fails; an error of the items ends it, too."""

    def run(results):
        found = []
        with contextlib.suppress(ZeroDivisionError):
            found.extend(results)  # keeps what came before an error
        return found

    def function(item):
        return 1 / (item - fails_at)

    assert run(prefetch_map(function, range(num_items), num_ahead)) == run(map(function, range(num_items)))
    with pytest.raises(ValueError, match="x"):
        list(prefetch_map(str, map(int, ["1", "x"]), num_ahead))


def test_workers_need_no_shared_memory(corpus, monkeypatch):
    """Docker limits /dev/shm to 64 MB. A worker that found no space there lost its chunk, and the loader waited."""

    def full(storage):
        raise RuntimeError("unable to allocate shared memory(shm)")

    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", full)
    audio = reader(corpus)
    order = RowsInOrder(audio.corpus.rows_per_group, range(len(audio.corpus.rows_per_group)))
    (sent, *_), (read, *_) = (ClipStream([audio], order, 4).load(num_workers=n, timeout=20 if n else 0) for n in (1, 0))
    for clip, wanted in zip(sent.clips, read.clips, strict=True):
        assert clip.samples_S.equal(wanted.samples_S) and clip.name == wanted.name


def test_validation_takes_the_same_clips_on_any_number_of_ranks(tokenizer, monkeypatch):
    monkeypatch.chdir(ROOT)
    flags = ["--job.config_file", "config/tiny.toml", "--data.validation_clips", "7"]

    def rows(num_ranks):
        monkeypatch.setenv("WORLD_SIZE", str(num_ranks))
        loaders = [
            build_validation_dataloader(num_ranks, rank, tokenizer, parse_config(flags)) for rank in range(num_ranks)
        ]
        labels = torch.cat([labels_BL for loader in loaders for _, labels_BL in loader]).tolist()
        return sorted(row for row in labels if set(row) != {IGNORE_INDEX})

    assert rows(1) == rows(2) == rows(3) and len(rows(1)) == 7


def test_audio_is_packed_as_its_codes_are(codec, tokenizer):
    """The online path: the same rows as from codes that were made before."""
    loader = speech_loader(str(TINY / "corpus" / "validation-*.parquet"), codec, tokenizer, 0.0, is_packed=True)
    refs, clone = [], loader._order.clone()
    packer = BatchPacker(tokenizer, 2, 16, is_packed=True, has_positions=True)
    batches = iter(loader)
    while not packer.is_full:
        refs.append(clone.take())
        table = loader._readers[0].corpus.read_group(refs[-1].group)
        (clip,) = loader._readers[0].clips(table, refs[-1])
        (codes_TQ,) = codec.encode([clip.samples_S])
        packer.add(codes_TQ.numpy(), is_cut=clip.is_cut)
    inputs, labels_BL = next(batches)
    expected, expected_labels_BL = packer.take()
    assert inputs["input"].equal(expected["input"]) and labels_BL.equal(expected_labels_BL)
    assert inputs["positions"].equal(expected["positions"])


def test_columns_and_paths_are_checked(corpus, tmp_path):
    with pytest.raises(UserError, match="no column 'sound' for the audio, only"):
        open_corpus(corpus, None, "sound", None)
    with pytest.raises(UserError, match="has no column 'transcript' for the text, only"):
        open_corpus(corpus, None, "audio", "transcript")
    with pytest.raises(UserError, match="no Parquet, tar or audio file and no JSONL manifest matches"):
        open_corpus(str(tmp_path / "*.parquet"), None, "audio", None)
    with pytest.raises(UserError, match="hf download MLCommons/peoples_speech"):
        open_corpus("peoples_speech", str(tmp_path), "audio", None)


def test_named_corpora_read_a_local_download(tmp_path):
    (tmp_path / "clean").mkdir()
    write_corpus(tmp_path / "clean", [GOOD] * 8)
    for file in (tmp_path / "clean").glob("train-*.parquet"):
        file.rename(file.with_name(f"{file.stem}-of-00003.parquet"))
    corpus = open_corpus("peoples_speech", str(tmp_path), "audio", "text")
    ids = [name for group in range(len(corpus.rows_per_group)) for name in corpus.read_group(group)["id"].to_pylist()]
    assert sorted(ids) == [f"clip-{i:03}" for i in range(8)]


def test_corpora_lie_on_any_file_system(corpus):
    memory = fsspec.filesystem("memory")
    for path in sorted(Path(corpus).glob("*.parquet")):
        memory.pipe_file(f"/speech/{path.name}", path.read_bytes())
    there, here = open_corpus("memory://speech", None, "audio", "text"), open_corpus(corpus, None, "audio", "text")
    assert there.rows_per_group.tolist() == here.rows_per_group.tolist()
    assert there.read_group(4).equals(here.read_group(4))
    assert open_corpus("memory://speech/train-1.parquet", None, "audio", "text").rows_per_group.sum() == 9


def test_a_damaged_file_is_named(corpus, tmp_path):
    whole = (Path(corpus) / "train-0.parquet").read_bytes()
    (tmp_path / "half.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"half.parquet' is not a readable Parquet file"):
        open_corpus(str(tmp_path), None, "audio", None)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_damage_behind_a_sound_footer_is_one_sentence(corpus, tmp_path, num_workers):
    """Also where a loader worker finds it."""
    content = bytearray((Path(corpus) / "train-0.parquet").read_bytes())
    content[4:40] = bytes(36)
    (tmp_path / "damaged.parquet").write_bytes(content)
    with pytest.raises(UserError, match="not a readable Parquet file") as error:
        read_all(reader(str(tmp_path)), num_workers=num_workers)
    assert "Traceback" not in str(error.value)


def test_every_file_needs_the_columns(corpus, tmp_path):
    for path in Path(corpus).glob("*.parquet"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    table = pq.read_table(tmp_path / "train-2.parquet").drop_columns(["text"])
    pq.write_table(table, tmp_path / "train-2.parquet")
    with pytest.raises(UserError, match=r"train-2.parquet' of the dataset .* has no column 'text'"):
        open_corpus(str(tmp_path), None, "audio", "text")


def test_empty_files_are_no_windows(corpus, tmp_path):
    table = pq.read_table(Path(corpus) / "train-0.parquet")
    pq.write_table(table, tmp_path / "train-0.parquet")
    pq.write_table(table.slice(0, 0), tmp_path / "train-1.parquet")
    assert open_corpus(str(tmp_path), None, "audio", None).rows_per_group.tolist() == [9]


@pytest.mark.parametrize("path", ["nothing://speech", "s3://speech"])
def test_protocols_that_cannot_be_opened(path):
    with pytest.raises(UserError, match="cannot be opened"):
        open_corpus(path, None, "audio", None)


def test_the_tiny_corpus_has_ids_and_texts():
    corpus = open_corpus(str(TINY / "corpus" / "validation-*.parquet"), None, "audio", "text")
    row = corpus.read_group(0).slice(0, 1).to_pylist()[0]
    assert row["audio"]["bytes"][:4] == b"OggS" and row["text"] and row["id"]


@pytest.mark.slow
def test_workers_end_with_a_killed_process(corpus):
    """They hold more than a pipe takes, so that waiting for a reader would be for ever."""
    script = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_clips import AudioReader, ClipStream, RowsInOrder, reader
audio = reader({corpus!r})
rows_per_group = audio.corpus.rows_per_group
chunks = ClipStream([audio], RowsInOrder(rows_per_group, list(range(len(rows_per_group))) * 9), 40).load(num_workers=2)
next(chunks)
print("reading", flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"reading\n"
    process.kill()
    process.communicate(timeout=30)  # the output ends when the last of its holders does
