"""The clip stream: every clip once an epoch, whatever the ranks, workers and kill points; nothing lost in silence."""

import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from torchtitan.components.dataloader import ParallelAwareDataloader

from llama_mimi.clips import ClipStream
from llama_mimi.corpora import open_corpus
from llama_mimi.dataloader import UnitDataLoader
from llama_mimi.errors import UserError

RATE = 24_000
GOOD = object()


def write_corpus(folder, contents, num_files=3, rows_per_group=4):
    """Parquet files of short clips; a content is GOOD, bytes, or None. Names are clip-000, clip-001, ..."""
    path = folder / "clip.wav"
    soundfile.write(path, torch.zeros(2000).numpy(), RATE)
    rows = [
        {
            "id": f"clip-{i:03}",
            "audio": {"bytes": path.read_bytes() if content is GOOD else content, "path": None},
            "text": f"text {i}",
        }
        for i, content in enumerate(contents)
    ]
    struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    schema = pa.schema({"id": pa.string(), "audio": struct, "text": pa.string()})
    for k in range(num_files):
        table = pa.Table.from_pylist(rows[k::num_files], schema)
        pq.write_table(table, folder / f"train-{k}.parquet", row_group_size=rows_per_group)
    return str(folder)


def stream(corpus, dp_rank=0, dp_world_size=1, *, batch_size=2, seed=0, is_endless=True, shuffle_block=5, text=None):
    return ClipStream(
        open_corpus(corpus, None, "audio", text),
        batch_size=batch_size,
        dp_rank=dp_rank,
        dp_world_size=dp_world_size,
        sample_rate_hz=RATE,
        frame_size=1920,
        max_seconds=1.0,
        seed=seed,
        shuffle_block=shuffle_block,
        is_endless=is_endless,
    )


def batch_loader(clips, dp_rank=0, dp_world_size=1, num_workers=0):
    return ParallelAwareDataloader(
        clips, dp_rank, dp_world_size, batch_size=None, collate_fn=lambda batch: batch, num_workers=num_workers
    )


def names(batches):
    return [clip.name for batch in batches for clip in batch.clips]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"), [GOOD] * 26)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("dp_world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", [None, 7])
def test_every_clip_once_an_epoch(corpus, dp_world_size, num_workers, seed):
    seen = []
    for rank in range(dp_world_size):
        clips = stream(corpus, rank, dp_world_size, seed=seed, is_endless=False)
        workers = min(num_workers, clips.max_workers)
        seen += names(batch_loader(clips, rank, dp_world_size, workers))
    assert Counter(seen) == Counter(f"clip-{i:03}" for i in range(26))


def test_epochs_are_permutations_that_differ(corpus):
    batches = iter(stream(corpus, batch_size=1))
    first, second = (names(next(batches) for _ in range(26)) for _ in range(2))
    assert sorted(first) == sorted(second) and first != second
    assert first != sorted(first)


@settings(max_examples=15, deadline=None)
@given(
    kill_after=st.integers(0, 40),
    batch_size=st.integers(1, 4),
    shuffle_block=st.integers(1, 30),
    rank=st.integers(0, 1),
)
def test_a_resumed_stream_is_the_same_stream(corpus, kill_after, batch_size, shuffle_block, rank):
    def make():
        return stream(corpus, rank, 2, batch_size=batch_size, shuffle_block=shuffle_block)

    whole = make()
    batches = iter(whole)
    for _ in range(kill_after):
        next(batches)
    state = json.loads(json.dumps(whole.state_dict()))  # small and plain: a position, not a buffer
    expected = names(next(batches) for _ in range(12))
    resumed = make()
    resumed.load_state_dict(state)
    batches = iter(resumed)
    assert names(next(batches) for _ in range(12)) == expected


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_loader_is_the_same_loader(corpus, num_workers):
    def make():
        return batch_loader(stream(corpus), num_workers=num_workers)

    whole = make()
    batches = iter(whole)
    for _ in range(9):
        next(batches)
    state = whole.state_dict()
    expected = names(next(batches) for _ in range(9))
    resumed = make()
    resumed.load_state_dict(state)
    batches = iter(resumed)
    assert names(next(batches) for _ in range(9)) == expected


BAD = [b"", b"no audio at all", None]


def test_bad_clips_are_counted_and_named(tmp_path):
    corpus = write_corpus(tmp_path, [GOOD] * 10 + BAD)
    batches = list(stream(corpus, is_endless=False, seed=None))
    assert sorted(names(batches)) == [f"clip-{i:03}" for i in range(10)]
    skipped = {clip.message.split("'")[1]: clip.reason for batch in batches for clip in batch.skipped}
    assert skipped == {"clip-010": "empty", "clip-011": "unreadable", "clip-012": "no audio"}


def unit_loader(corpus, codec, sequences, max_bad_share):
    return UnitDataLoader(
        batch_loader(stream(corpus)), codec, sequences, dataset=corpus, seq_len=16, max_bad_share=max_bad_share
    )


@pytest.mark.parametrize(("num_bad", "max_bad_share", "stops"), [(1, 0.01, False), (3, 0.01, True), (3, 0.5, False)])
def test_training_stops_at_too_large_a_share(tmp_path, codec, sequences, num_bad, max_bad_share, stops):
    corpus = write_corpus(tmp_path, [GOOD] * 97 + BAD[:num_bad])
    batches = iter(unit_loader(corpus, codec, sequences, max_bad_share))
    if stops:
        with pytest.raises(UserError, match="data.max_bad_share"):
            for _ in range(50):
                next(batches)
    else:
        for _ in range(48):
            next(batches)


def test_a_corpus_without_a_usable_clip_ends(tmp_path, codec, sequences):
    with pytest.raises(UserError, match="can be used"):
        next(iter(unit_loader(write_corpus(tmp_path, [b"no audio"] * 6), codec, sequences, 1.0)))


def test_counts_survive_a_checkpoint(tmp_path, codec, sequences):
    corpus = write_corpus(tmp_path, [GOOD] * 60 + BAD[:1])
    loader = unit_loader(corpus, codec, sequences, 0.5)
    batches = iter(loader)
    for _ in range(40):
        next(batches)
    again = unit_loader(corpus, codec, sequences, 0.5)
    again.load_state_dict(loader.state_dict())
    assert again._counts == loader._counts and again._counts["read"] >= 80


def test_columns_and_paths_are_checked(corpus, tmp_path):
    with pytest.raises(UserError, match="no column 'sound' for the audio, only"):
        open_corpus(corpus, None, "sound", None)
    with pytest.raises(UserError, match="set data.text_column"):
        open_corpus(corpus, None, "audio", "transcript")
    with pytest.raises(UserError, match="no Parquet file matches"):
        open_corpus(str(tmp_path / "*.parquet"), None, "audio", None)
    with pytest.raises(UserError, match="hf download MLCommons/peoples_speech"):
        open_corpus("peoples_speech", str(tmp_path), "audio", None)


def test_named_corpora_read_a_local_download(tmp_path):
    (tmp_path / "clean").mkdir()
    write_corpus(tmp_path / "clean", [GOOD] * 8)
    for file in (tmp_path / "clean").glob("train-*.parquet"):
        file.rename(file.with_name(f"{file.stem}-of-00003.parquet"))
    rows = open_corpus("peoples_speech", str(tmp_path), "audio", "text")
    assert sorted(row["id"] for row in rows) == [f"clip-{i:03}" for i in range(8)]


def test_tiny_corpus_reads_without_torchcodec():
    rows = open_corpus(str(TINY / "corpus" / "validation-*.parquet"), None, "audio", "text")
    row = next(iter(rows))
    assert row["audio"]["bytes"][:4] == b"OggS" and row["text"] and row["id"]
