"""Reading of audio corpora in workers, and counts of skipped clips."""

import contextlib
import itertools
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from conftest import ROOT, TINY

from llama_mimi.common.errors import UserError
from llama_mimi.corpora.clips import AudioReader, is_too_many, read_in_workers
from llama_mimi.corpora.formats import open_source
from llama_mimi.data.build import build_dataloader
from llama_mimi.data.dataloader import DataMeter, SpeechDataLoader, read_chunks
from llama_mimi.data.order import RowsInOrder, ShuffledOrder, Stream
from llama_mimi.data.packing import BatchPacker
from llama_mimi.tokens.tokenizer import IGNORE_INDEX, load_speech_tokenizer
from llama_mimi.training.config_file import parse_config

RATE = 24_000
GOOD = object()


def write_corpus(folder, contents, num_files=3, texts=None):
    """Write Parquet files of short clips clip-000, clip-001, ...; the content of a clip is GOOD, bytes or None."""
    soundfile.write(folder / "clip.wav", np.zeros(2000), RATE)
    good, texts = (folder / "clip.wav").read_bytes(), texts or [f"text {i}" for i in range(len(contents))]
    rows = [
        {"id": f"clip-{i:03}", "audio": {"bytes": good if content is GOOD else content, "path": None}, "text": text}
        for i, (content, text) in enumerate(zip(contents, texts, strict=True))
    ]
    struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    schema = pa.schema({"id": pa.string(), "audio": struct, "text": pa.string()})
    for k in range(num_files):
        table = pa.Table.from_pylist(rows[k::num_files], schema)
        pq.write_table(table, folder / f"train-{k}.parquet", row_group_size=4)
    return str(folder)


def reader(corpus, text=None, max_frames=12, path=None):
    source = open_source(corpus, path, "audio", text)
    with_text = text is not None
    return AudioReader(source, sample_rate_hz=RATE, frame_size=1920, max_frames=max_frames, with_text=with_text)


def read_all(reader, dp_rank=0, dp_world_size=1, num_workers=0):
    """Let the workers of training read every clip of one rank once; return the clips in corpus order."""
    streams = [Stream("audio", reader)]
    read = partial(read_chunks, streams, RowsInOrder(streams, dp_rank, dp_world_size), 3)
    return [clip for chunk in read_in_workers(read, num_workers=num_workers) for _, clip in chunk]


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


BAD = [b"", b"no audio at all", None]


def speech_loader(corpus, codec, tokenizer, max_skip_fraction, **extra):
    audio = [Stream("audio", reader(corpus))]
    order = ShuffledOrder(audio, [1.0], 0, 1, shuffle_window=5, seed=0)
    packer = BatchPacker(tokenizer, 2, 16, is_packed=False, has_positions=False)
    return SpeechDataLoader(audio, order, packer, codec, workers={}, max_skip_fraction=max_skip_fraction, **extra)


@pytest.mark.parametrize("packing", ["pad", "pack"])
@pytest.mark.parametrize("architecture", ["flattened", "hierarchical"])
def test_a_text_that_leaves_no_room_for_audio_is_skipped(tmp_path, caplog, monkeypatch, architecture, packing):
    monkeypatch.chdir(ROOT)
    corpus = write_corpus(tmp_path, [GOOD] * 4, num_files=1, texts=["the doctor", "the doctor " * 200] * 2)
    settings = {"data.tasks": "tts", "model.architecture": architecture, "data.packing": packing}
    settings |= {"training.dataset": corpus, "validation.dataset": corpus, "data.max_skip_fraction": 1}
    flags = [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
    job_config = parse_config(["--job.config_file", "config/tiny.toml", *flags])
    builder = load_speech_tokenizer(str(TINY / "llama"), str(TINY / "mimi"), 4, "llama", architecture)
    for is_validation in (False, True):
        caplog.clear()
        loader = build_dataloader(1, 0, builder, job_config, is_validation=is_validation)
        _, labels = next(iter(loader))
        assert (labels != IGNORE_INDEX).flatten(1).any(dim=1).sum() == 2
        assert "filtered: too long: 'clip-00" in caplog.text and "tokens must stay in one sequence" in caplog.text


@pytest.mark.parametrize(("num_clips", "stops"), [(120, False), (40, True)])
def test_the_share_is_judged_after_a_hundred_clips_and_at_the_end(tmp_path, codec, tokenizer, num_clips, stops):
    """The first three clips are bad. 2.8 % may be bad: 3.4 of 120 clips; 2.8 of 40 clips, as 40 count as 100."""
    loader = speech_loader(write_corpus(tmp_path, BAD + [GOOD] * (num_clips - 3), 1), codec, tokenizer, 0.028)
    loader.order = RowsInOrder(loader.streams)
    with pytest.raises(UserError, match="3 of 40 clips .* could not be used") if stops else contextlib.nullcontext():
        assert len(list(loader)) == 59  # batches of two clips


@pytest.mark.parametrize(("fraction", "num_ended"), [(0.006, 0), (0.03, 8)])
def test_a_sample_with_bad_clips_by_chance_is_accepted(fraction, num_ended):
    """Each of 8 ranks reads 10,000 clips, of which 1 % may be bad."""
    bad = np.random.default_rng(0).random((8, 10_000)) < fraction
    counts = [enumerate(np.flatnonzero(of_rank) + 1, 1) for of_rank in bad]  # number of clips read at each bad clip
    ended = [any(is_too_many(k, n, 0.01, is_end=False, is_whole=False) for k, n in of_rank) for of_rank in counts]
    assert sum(ended) == num_ended


def test_a_corpus_without_a_usable_clip_ends(tmp_path, codec, tokenizer):
    with pytest.raises(UserError, match="6 of 6 clips .* could not be used .* repair or remove these clips$"):
        next(iter(speech_loader(write_corpus(tmp_path, [b"no audio"] * 6), codec, tokenizer, 1.0)))


def test_counts_survive_a_checkpoint(tmp_path, codec, tokenizer):
    corpus, meter = write_corpus(tmp_path, [GOOD] * 60 + BAD[:1]), DataMeter()
    loader = speech_loader(corpus, codec, tokenizer, 0.5)
    assert len(list(itertools.islice(loader, 40))) == 40
    again = speech_loader(corpus, codec, tokenizer, 0.5, meter=meter)
    again.load_state_dict(loader.state_dict())
    assert again.counts["read"] == loader.counts["read"] >= 80
    next(iter(again))
    assert (meter.num_clips, meter.num_frames) == (82, 164), "two rows of two frames a batch"
    assert meter.codec_seconds > 0


def test_workers_need_no_shared_memory(corpus, monkeypatch):
    """Docker limits /dev/shm to 64 MB. Without space, a worker would lose its chunk, and the loader would hang."""

    def full(storage):
        raise RuntimeError("unable to allocate shared memory(shm)")

    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", full)
    audio = [Stream("audio", reader(corpus))]
    chunks = partial(read_chunks, audio, RowsInOrder(audio), 4)
    sent, read = (next(read_in_workers(chunks, num_workers=n, timeout=20 if n else 0)) for n in (1, 0))
    for (_, clip), (_, wanted) in zip(sent, read, strict=True):
        assert np.array_equal(clip.samples_S, wanted.samples_S) and clip.name == wanted.name


@pytest.mark.parametrize("settings", [{"prefetch_factor": 2}, {"persistent_workers": True}, {"num_workers": -1}])
def test_worker_settings_that_do_not_fit_are_one_sentence(settings):
    with pytest.raises(UserError, match="the dataloader settings .* contradict each other"):
        next(read_in_workers(lambda worker, num_workers: [], **settings))


def test_validation_takes_the_same_clips_on_any_number_of_ranks(tokenizer, monkeypatch):
    monkeypatch.chdir(ROOT)
    flags = ["--job.config_file", "config/tiny.toml", "--data.validation_clips", "7"]

    def rows(num_ranks):
        monkeypatch.setenv("WORLD_SIZE", str(num_ranks))
        loaders = [
            build_dataloader(num_ranks, rank, tokenizer, parse_config(flags), is_validation=True)
            for rank in range(num_ranks)
        ]
        labels = torch.cat([labels_BL for loader in loaders for _, labels_BL in loader]).tolist()
        return sorted(row for row in labels if set(row) != {IGNORE_INDEX})

    assert rows(1) == rows(2) == rows(3) and len(rows(1)) == 7


def without_text(folder):
    pq.write_table(pq.read_table(folder / "train-2.parquet").drop_columns(["text"]), folder / "train-2.parquet")


def cut_in_half(folder):
    content = (folder / "train-0.parquet").read_bytes()
    (folder / "train-0.parquet").write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("corpus", "audio", "text", "change", "message"),
    [
        ("{}", "sound", None, None, "'sound'"),
        ("{}", "audio", "text", without_text, r"train-2\.parquet' .*'text'"),
        ("{}", "audio", None, cut_in_half, r"train-0\.parquet' is not a readable Parquet file"),
        ("{}/other/*.parquet", "audio", None, None, "other/\\*.parquet"),
        ("s3://speech", "audio", None, None, "cannot be opened"),
        ("peoples_speech", "audio", None, None, "peoples_speech"),
    ],
)
def test_corpora_that_cannot_be_opened(tmp_path, corpus, audio, text, change, message):
    write_corpus(tmp_path, [GOOD] * 9)
    if change:
        change(tmp_path)
    path = str(tmp_path) if corpus == "peoples_speech" else None
    with pytest.raises(UserError, match=message):
        open_source(corpus.format(tmp_path), path, audio, text)


def test_named_corpora_read_a_local_download(tmp_path):
    (tmp_path / "clean").mkdir()
    write_corpus(tmp_path / "clean", [GOOD] * 8)
    for file in (tmp_path / "clean").glob("train-*.parquet"):
        file.rename(file.with_name(f"{file.stem}-of-00003.parquet"))
    clips = read_all(reader("peoples_speech", "text", path=str(tmp_path)))
    assert sorted(clip.name for clip in clips) == [f"clip-{i:03}" for i in range(8)]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_damage_behind_a_sound_footer_is_one_sentence(corpus, tmp_path, num_workers):
    """The error has one sentence, also if a loader worker finds the damage."""
    content = bytearray((Path(corpus) / "train-0.parquet").read_bytes())
    content[4:40] = bytes(36)
    (tmp_path / "damaged.parquet").write_bytes(content)
    with pytest.raises(UserError, match="not a readable Parquet file") as error:
        read_all(reader(str(tmp_path)), num_workers=num_workers)
    assert "Traceback" not in str(error.value)


@pytest.mark.slow
def test_workers_end_with_a_killed_process(corpus):
    """The workers send more data than a pipe can hold, so without a reader they would wait for ever."""
    script = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_clips import RowsInOrder, Stream, partial, read_chunks, read_in_workers, reader
audio = [Stream("audio", reader({corpus!r}))]
chunks = read_in_workers(partial(read_chunks, audio, list(RowsInOrder(audio)) * 9, 40), num_workers=2)
next(chunks)
print("reading", flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"reading\n"
    process.kill()
    process.communicate(timeout=30)  # the output is closed when the last worker ends
