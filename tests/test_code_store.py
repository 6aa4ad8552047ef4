"""Tokenising a corpus once, as a user does it, and training from what that leaves; every damage gets one sentence."""

import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
import tyro
from conftest import ROOT, TINY, checked_config
from datasets import load_dataset
from forked_ranks import ForkedRanks

from llama_mimi.audio.mimi import MimiCodec, codec_hash
from llama_mimi.audio.reading import OPPOSITE, read_audio
from llama_mimi.common.errors import UserError
from llama_mimi.common.files import write_atomically
from llama_mimi.data.build import build_dataloader, build_validation_dataloader
from llama_mimi.data.clip_readers import CodeReader
from llama_mimi.data.clips import ClipStream
from llama_mimi.data.code_store import CodeCorpus, CodedClip, is_store, shard_bytes
from llama_mimi.data.code_writer import TokenizationOptions
from llama_mimi.data.order import RowsInOrder
from llama_mimi.data.tokenization import tokenize_corpus
from llama_mimi.train_spec import build_speech_tokenizer

CODEC = str(TINY / "mimi")


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """24 clips of real codec speech in three row groups, one of them no audio."""
    folder = tmp_path_factory.mktemp("speech")
    table = pq.read_table(TINY / "corpus" / "validation-00000-of-00001.parquet").slice(0, 24)
    rows = table.to_pylist()
    rows[13]["audio"]["bytes"] = b"no audio"
    rows[14]["audio"]["bytes"] = in_opposite_phases(rows[14]["audio"]["bytes"])
    pq.write_table(pa.Table.from_pylist(rows, table.schema), folder / "clips.parquet", row_group_size=8)
    return folder


def tokenize(corpus, output_dir, *flags, nproc=1, timeout=240):
    names = ["--corpus", corpus, "--codec", CODEC, "--output_dir", output_dir, "--clips_per_shard", 8]
    command = ["scripts/tokenize_corpus.py", *names, "--num_workers", 1, *flags]
    with tempfile.TemporaryDirectory() as folder:
        ranks = ForkedRanks(nproc, command, Path(folder) / "log")
        return SimpleNamespace(returncode=ranks.wait(timeout), output=ranks.output)


def in_opposite_phases(content: bytes) -> bytes:
    samples_S, rate_hz = soundfile.read(io.BytesIO(content))
    stream = io.BytesIO()
    soundfile.write(stream, np.stack([samples_S, -samples_S], axis=1), rate_hz, format="FLAC")
    return stream.getvalue()


@pytest.fixture(scope="module")
def store(speech, tmp_path_factory):
    """The corpus tokenised on two ranks."""
    folder = tmp_path_factory.mktemp("codes") / "store"
    done = tokenize(speech, folder, "--max_audio_seconds", 4, "--max_skip_fraction", 0.1, nproc=2)
    assert done.returncode == 0, done.output[-3000:]
    assert "23 clips" in done.output and "1 skipped" in done.output and "not readable audio" in done.output
    name = pq.read_table(speech, columns=["id"])["id"][14].as_py()
    assert f"clip '{name}': {OPPOSITE}" in done.output and manifest(folder)["audio_warnings"] == {OPPOSITE: 1}
    return folder


def manifest(folder):
    return json.loads((Path(folder) / "manifest.json").read_text())


def test_shards_hold_what_the_codec_says_of_each_clip_alone(store, speech):
    codec = MimiCodec(CODEC, 8)
    rows = load_dataset("parquet", data_files=str(store / "shard-*.parquet"), split="train")  # as they are
    source = {row["id"]: row for row in pq.read_table(speech / "clips.parquet").to_pylist()}
    assert len(rows) == 23 and set(rows["id"]) < set(source)
    for row in rows:
        waveform = read_audio(source[row["id"]]["audio"]["bytes"], 24_000, max_seconds=4.0)
        assert np.array_equal(np.array(row["codes"]), codec.encode([waveform.samples_S])[0].numpy())
        assert row["duration"] == pytest.approx(waveform.seconds) and row["is_cut"] == waveform.is_cut
        assert row["text"] == source[row["id"]]["text"] and row["speaker"] == source[row["id"]]["speaker"]
    assert rows.features["codes"].feature.feature.dtype == "uint16"
    assert any(rows["is_cut"]) and not all(rows["is_cut"])


def test_the_manifest_says_what_is_there(store):
    found = manifest(store)
    assert found["codec"]["sha256"] == codec_hash(CODEC) and found["codec"]["num_quantizers"] == 8
    assert (
        found["clips"] == 23
        and found["skipped"] == {"unreadable": 1}
        and "not readable audio" in found["skipped_first"][0]
    )
    rows = pq.read_table([store / shard["file"] for shard in found["shards"]])
    seconds = rows["duration"].to_pylist()
    assert sum(n for n, _ in found["by_second"]) == 23
    cut_mean = sum(min(s, 3.0) for s in seconds) / len(seconds)
    assert CodeCorpus(str(store), CODEC, 8, with_text=False).mean_seconds(3.0) == pytest.approx(cut_mean)
    assert found["hours"] == pytest.approx(sum(rows["duration"].to_pylist()) / 3600)
    assert found["cut"] == sum(rows["is_cut"].to_pylist()) and "torch" in found["versions"]
    assert {shard["file"]: shard["bytes"] for shard in found["shards"]} == {
        path.name: path.stat().st_size for path in store.glob("shard-*")
    }


def test_a_run_that_was_cut_off_finishes_on_other_ranks(store, speech, tmp_path):
    """A shard is missing, another is half written under its name aside, and the manifest was not reached."""
    again = shutil.copytree(store, tmp_path / "store")
    (again / "manifest.json").unlink()
    (again / "shard-000001.parquet").rename(again / ".0123.partial")
    kept = {path.name: path.stat().st_mtime_ns for path in again.glob("shard-*.parquet")}
    done = tokenize(speech, again, "--max_audio_seconds", 4, "--max_skip_fraction", 0.1, nproc=1)
    assert done.returncode == 0, done.output[-3000:]
    assert not list(again.glob("*.partial"))
    for name, time_ns in kept.items():
        assert (again / name).stat().st_mtime_ns == time_ns, "what is there is not made again"
    for path in store.glob("shard-*.parquet"):
        assert pq.read_table(path).equals(pq.read_table(again / path.name))
    assert manifest(again)["shards"] == manifest(store)["shards"]


def run_alone(monkeypatch, *flags):
    """In this process, as `python scripts/tokenize_corpus.py` does it."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    options = tyro.cli(TokenizationOptions, args=[*map(str, flags), "--num_workers", "0"], use_underscores=True)
    tokenize_corpus(options)


def test_output_on_another_file_system(speech, store, monkeypatch):
    fs = fsspec.filesystem("memory")
    flags = ["--corpus", speech, "--codec", CODEC, "--clips_per_shard", 8, "--max_audio_seconds", 4]
    run_alone(monkeypatch, *flags, "--max_skip_fraction", 0.1, "--output_dir", "memory://codes/store")
    there = CodeCorpus("memory://codes/store", CODEC, 8, with_text=True)
    here = CodeCorpus(str(store), CODEC, 8, with_text=True)
    assert there.rows_per_group.tolist() == here.rows_per_group.tolist() and not fs.glob("codes/store/*.partial")
    assert np.array_equal(there.read_group(2).frames_NQ, here.read_group(2).frames_NQ)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_quantizers", 4], "made with codec.num_quantizers = 8, but it is 4 now"),
        (["--max_audio_seconds", 3], "made with max_audio_seconds = 4.0, but it is 3.0 now"),
        (["--clips_per_shard", 16], "made with shards_sha256 (--clips_per_shard)"),
        (["--num_quantizers", 9], "1 to 8 levels"),
        (["--corpus", TINY / "words" / "train-*.parquet"], "made with corpus_sha256 = "),
        (["--corpus", TINY / "words"], "holds the splits train, validation; choose one (data.split"),
        (["--no_codec_sliding_window"], "made with codec.sliding_window = True, but it is False now"),
        (["--text_column", "none"], "made with columns"),
        (["--batch_seconds", 0], "must be a positive number"),
        (["--max_audio_seconds", 0.01], "less than a frame"),
        (["--max_audio_seconds", "inf"], "must be a positive number"),
        (["--audio_column", "text"], "not a struct of audio bytes and path"),
        (["--output_dir", "nothing://codes"], "cannot be opened"),
        (["--max_skip_fraction", 2], "share between 0 and 1"),
        (["--corpus", "nothing/*.parquet"], "no Parquet, tar or audio file and no JSONL manifest matches"),
        (["--audio_column", "sound"], "no column 'sound'"),
        (["--codec", "models/none/here"], "does not exist"),
    ],
    ids=str,
)
def test_mistakes_get_one_sentence(flags, message, store, speech, tmp_path, monkeypatch):
    again = shutil.copytree(store, tmp_path / "store")
    usual = [
        "--corpus",
        speech,
        "--codec",
        CODEC,
        "--clips_per_shard",
        8,
        "--max_audio_seconds",
        4,
        "--output_dir",
        again,
    ]
    with pytest.raises(UserError) as error:
        run_alone(monkeypatch, *usual, *flags)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert manifest(again) == manifest(store), "nothing was touched"


def test_too_many_bad_clips_stop_before_the_manifest(speech, tmp_path, monkeypatch):
    flags = ["--corpus", speech, "--codec", CODEC, "--clips_per_shard", 8, "--output_dir", tmp_path / "store"]
    with pytest.raises(UserError, match=r"1 of 14 clips could not be used, more than --max_skip_fraction 0 "):
        run_alone(monkeypatch, *flags, "--max_skip_fraction", 0)
    assert not (tmp_path / "store" / "manifest.json").exists()


def test_the_output_is_no_part_of_the_corpus(speech, monkeypatch):
    with pytest.raises(UserError, match="lies inside the corpus"):
        run_alone(monkeypatch, "--corpus", speech, "--codec", CODEC, "--output_dir", speech / "codes")


def test_two_runs_do_not_share_an_output(speech, tmp_path, monkeypatch):
    first = subprocess.Popen(
        [sys.executable, "-c", f"import fcntl,time;f=open('{tmp_path}/.lock','w');fcntl.lockf(f,2);print(1,flush=True);"
         "time.sleep(60)"],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert first.stdout.readline()
        with pytest.raises(UserError, match="another process writes to .* choose another --output_dir"):
            run_alone(monkeypatch, "--corpus", speech, "--codec", CODEC, "--output_dir", tmp_path)
    finally:
        first.kill()
        first.wait()
    run_alone(monkeypatch, "--corpus", speech, "--codec", CODEC, "--output_dir", tmp_path, "--max_skip_fraction", 1)
    assert manifest(tmp_path)["clips"] == 23, "a lock ends with its process"


def test_a_full_disk_leaves_no_half_shard(tmp_path, monkeypatch):
    full = os.open("/dev/full", os.O_WRONLY)
    local = type(fsspec.filesystem("file"))
    monkeypatch.setattr(local, "pipe_file", lambda self, path, content: os.write(full, content))
    with pytest.raises(UserError, match=r"No space left on device\); free disk space"):
        write_atomically(str(tmp_path), "shard-000000.parquet", b"codes")
    os.close(full)
    assert not (tmp_path / "shard-000000.parquet").exists()


# ---- training from it


def config(dataset, *flags):
    names = {
        "--job.config_file": ROOT / "config/tiny.toml",
        "--job.dump_folder": "outputs/of_no_run",
        "--training.dataset": dataset,
        "--validation.dataset": dataset,
        "--model.hf_assets_path": TINY / "llama",
        "--codec.name": CODEC,
        "--data.max_audio_seconds": 3.2,
    }
    return checked_config([*(str(word) for pair in names.items() for word in pair), *map(str, flags)])


@pytest.fixture
def world_of_one(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WORLD_SIZE", "1")


@pytest.mark.parametrize("packing", ["pad", "pack"])
@pytest.mark.parametrize("num_quantizers", [1, 4, 8])
def test_shards_give_the_batches_that_audio_gives(packing, num_quantizers, store, speech, world_of_one):
    """The same held-out rows from codes as from audio, at any depth; 3.2 s are whole frames and cut most clips."""
    depth = ["--codec.num_quantizers", num_quantizers, "--data.packing", packing]
    loaders = []
    for dataset in (store, speech):
        job_config = config(dataset, *depth, "--data.max_skip_fraction", 1)
        loaders.append(build_validation_dataloader(1, 0, build_speech_tokenizer(job_config), job_config))
    pairs = list(zip(*loaders, strict=True))
    assert pairs
    for (inputs, labels_BL), (others, other_labels_BL) in pairs:
        assert inputs["input"].equal(others["input"]) and labels_BL.equal(other_labels_BL)
        assert ("positions" in inputs) == (packing == "pack")


def test_a_mixture_has_the_shares_of_audio_asked_for(store, tmp_path, tokenizer, world_of_one):
    short = tmp_path / "short"
    write_store(short, lengths=[12] * 40, like=store)
    job_config = config(
        f"{store}, {short}", "--validation.no-enable", "--data.weights", 1.0, 3.0, "--data.packing", "pack"
    )
    loader = build_dataloader(1, 0, tokenizer, job_config)
    seconds = Counter()
    for ref, clip in loader._clips():
        seconds[ref.corpus] += len(clip.codes_TQ) / 12.5
        if sum(seconds.values()) > 600:
            break
    # within what cutting the longer clips at 3.2 s takes from their share
    assert seconds[1] / sum(seconds.values()) == pytest.approx(0.75, abs=0.03)


def test_text_comes_with_the_codes(store, tokenizer, world_of_one):
    loader = build_dataloader(1, 0, tokenizer, config(store, "--data.task", "tts", "--data.packing", "pack"))
    inputs, _ = next(iter(loader))
    text = tokenizer.text_tokenizer.decode(inputs["input"][0, 1:12])
    texts = pq.read_table(sorted(store.glob("shard-*.parquet")))["text"].to_pylist()
    assert any(known.startswith(text.split("<audio>")[0][:12]) for known in texts)


def write_store(folder, lengths, like, **changes):
    """A store of random codes by hand, as far as reading looks at it; ``changes`` are of its manifest's codec."""
    generator = np.random.default_rng(0)
    clips = [
        CodedClip(f"clip-{i}", generator.integers(0, 256, (length, 8)).astype(np.uint16), length / 12.5, False)
        for i, length in enumerate(lengths)
    ]
    columns = ["id", "codes", "duration", "is_cut"]
    content = shard_bytes(clips, 8, {"columns": columns})
    folder.mkdir()
    (folder / "shard-000000.parquet").write_bytes(content)
    made = manifest(like) | {
        "columns": columns,
        "clips": len(clips),
        "by_second": [[len(lengths), sum(lengths) / 12.5]],
    }
    made["codec"] |= changes
    made["shards"] = [{"file": "shard-000000.parquet", "clips": len(clips), "bytes": len(content)}]
    (folder / "manifest.json").write_text(json.dumps(made))
    return folder


def truncate(folder):
    path = sorted(folder.glob("shard-*.parquet"))[0]
    path.write_bytes(path.read_bytes()[:-40])


def edit_manifest(**changes):
    def edit(folder):
        (folder / "manifest.json").write_text(json.dumps(manifest(folder) | changes))

    return edit


def edit_codec(**changes):
    return lambda folder: edit_manifest(codec=manifest(folder)["codec"] | changes)(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "bytes, not"),
        (lambda folder: next(folder.glob("shard-000002*")).unlink(), "shard-000002.parquet"),
        (lambda folder: (folder / "manifest.json").unlink(), "its tokenisation is not finished"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "is not readable as JSON"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "is not a JSON object"),
        (edit_manifest(format=2), "format 2, not 1"),
        (edit_codec(sha256="0" * 64), "codec.sha256 = '000000000000"),
        (edit_codec(num_quantizers=2), "has 2 levels, fewer than codec.num_quantizers = 4"),
        (edit_codec(sliding_window=False), "made with codec.sliding_window = False, but it is True now"),
    ],
    ids=[
        "truncated",
        "missing",
        "unfinished",
        "no_json",
        "no_object",
        "format",
        "another_codec",
        "levels",
        "attention",
    ],
)
def test_damaged_stores_are_refused_at_the_start(damage, message, store, tmp_path, world_of_one):
    folder = shutil.copytree(store, tmp_path / "store")
    damage(folder)
    with pytest.raises(UserError) as error:
        config(folder)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_folder_of_another_program_is_no_store(tmp_path):
    (tmp_path / "manifest.json").write_text('{"audio_filepath": "a.wav"}\n{"audio_filepath": "b.wav"}\n')
    assert not is_store(str(tmp_path)) and not is_store("peoples_speech")


def test_a_store_has_no_splits(store, world_of_one):
    with pytest.raises(UserError, match="is a tokenised corpus without splits; leave dataset_path and the split out"):
        config(store, "--data.split", "train")


def test_a_store_without_text_trains_no_tts(store, tmp_path, world_of_one):
    with pytest.raises(UserError, match="has no text"):
        config(write_store(tmp_path / "store", [10], like=store), "--data.task", "tts")


def test_codes_outside_the_codebook_are_refused(store, tmp_path):
    folder = write_store(tmp_path / "store", [10, 20], like=store, codebook_size=200)
    with pytest.raises(UserError, match=r"holds the code 2\d\d, outside the codebook of 200"):
        CodeCorpus(str(folder), CODEC, 4, with_text=False).read_group(0)


def test_a_flipped_bit_is_found(store, tmp_path):
    """Of the same length and with a sound footer; pages carry checksums."""
    folder = write_store(tmp_path / "store", [50] * 20, like=store)
    path = folder / "shard-000000.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10  # in the codes
    path.write_bytes(content)
    for num_workers in (0, 1):
        reader = CodeReader(CodeCorpus(str(folder), CODEC, 4, with_text=False), max_frames=62, with_text=False)
        with pytest.raises(UserError, match="not a readable Parquet file") as error:
            list(ClipStream([reader], RowsInOrder(reader.corpus.rows_per_group, [0]), 3).load(num_workers=num_workers))
        assert "Traceback" not in str(error.value)


def test_a_shard_with_fewer_clips_than_the_manifest_says(store, tmp_path):
    folder = write_store(tmp_path / "store", [10, 20], like=store)
    edit_manifest(shards=[manifest(folder)["shards"][0] | {"clips": 3}])(folder)
    with pytest.raises(UserError, match="does not hold the clips"):
        CodeCorpus(str(folder), CODEC, 4, with_text=False).read_group(0)


def test_torch_reads_codes_at_any_depth(store):
    whole = CodeCorpus(str(store), CODEC, 8, with_text=False).read_group(0)
    for depth in (1, 3, 8):
        group = CodeCorpus(str(store), CODEC, depth, with_text=False).read_group(0)
        assert torch.from_numpy(group.codes(2).astype(np.int64)).equal(
            torch.from_numpy(whole.codes(2)[:, :depth].astype(np.int64))
        )
