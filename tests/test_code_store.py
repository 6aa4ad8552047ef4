"""Tokenising a corpus, training from its codes, and one sentence for each kind of damage."""

import io
import json
import shutil
import subprocess
import sys
import tarfile
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
import tyro
from conftest import ROOT, TINY, checked_config
from datasets import load_dataset
from forked_ranks import ForkedRanks
from layouts import add
from simulated import random_clips, write_codes

from llama_mimi.audio.mimi import MimiCodec, codec_hash, load_codec_config
from llama_mimi.audio.reading import OPPOSITE, read_audio
from llama_mimi.common.errors import UserError
from llama_mimi.corpora.code_shards import CodeCorpus, is_store
from llama_mimi.corpora.options import TokenizationOptions
from llama_mimi.corpora.source import Unit
from llama_mimi.corpora.tokenize import make_jobs, tokenize_corpus
from llama_mimi.data.build import build_dataloader
from llama_mimi.train_spec import build_speech_tokenizer

CODEC = str(TINY / "mimi")


@pytest.fixture(scope="module")
def rows():
    """Return 24 rows of real codec speech. One row has no audio, and one has channels that cancel each other."""
    rows = pq.read_table(TINY / "corpus" / "validation-00000-of-00001.parquet").slice(0, 24).to_pylist()
    samples_S, rate_hz = soundfile.read(io.BytesIO(rows[14]["audio"]["bytes"]))
    opposite = io.BytesIO()
    soundfile.write(opposite, np.stack([samples_S, -samples_S], axis=1), rate_hz, format="FLAC")
    rows[13]["audio"]["bytes"], rows[14]["audio"]["bytes"] = b"no audio", opposite.getvalue()
    return rows


@pytest.fixture(scope="module")
def speech(rows, tmp_path_factory):
    """Return a folder with the rows in a Parquet file of three row groups."""
    folder = tmp_path_factory.mktemp("speech")
    schema = pq.read_schema(TINY / "corpus" / "validation-00000-of-00001.parquet")
    pq.write_table(pa.Table.from_pylist(rows, schema), folder / "clips.parquet", row_group_size=8)
    return folder


def write_tar(path, rows):
    with tarfile.open(path, "w") as tar:
        for number, row in enumerate(rows):
            add(tar, f"{number:03d}.flac", row["audio"]["bytes"])
            add(tar, f"{number:03d}.json", json.dumps({key: row[key] for key in ("id", "text", "speaker")}).encode())


def tokenize(corpus, output_dir, *flags, nproc=1, timeout=240):
    names = ["--corpus", corpus, "--codec", CODEC, "--output_dir", output_dir, "--clips_per_shard", 8]
    command = ["scripts/tokenize_corpus.py", *names, "--num_workers", 1, *flags]
    with tempfile.TemporaryDirectory() as folder:
        ranks = ForkedRanks(nproc, command, Path(folder) / "log")
        return SimpleNamespace(returncode=ranks.wait(timeout), output=ranks.output)


def run_alone(*flags):
    """Tokenise in this process, like `python scripts/tokenize_corpus.py`."""
    words = ["--codec", CODEC, "--clips_per_shard", 8, "--num_workers", 0, "--max_skip_fraction", 0.1, *flags]
    tokenize_corpus(tyro.cli(TokenizationOptions, args=[*map(str, words)], use_underscores=True))


def manifest(folder):
    return json.loads((Path(folder) / "manifest.json").read_text())


def contents(folder):
    return {path.name: pq.read_table(path) for path in sorted(folder.glob("shard-*.parquet"))}


@pytest.fixture(scope="module")
def store(speech, tmp_path_factory):
    """Return the folder of codes that two ranks wrote for the corpus."""
    folder = tmp_path_factory.mktemp("codes") / "store"
    done = tokenize(speech, folder, "--max_audio_seconds", 4, "--max_skip_fraction", 0.1, nproc=2)
    assert done.returncode == 0, done.output[-3000:]
    assert "23 clips" in done.output and "not readable audio" in done.output
    assert f"\nto use these codes, set --training.dataset or --validation.dataset {folder}\n" in done.output
    assert '"skipped": {"unreadable": 1}' in done.output and f'"{OPPOSITE}": 1' in done.output
    return folder


def test_shards_contain_the_codes_of_each_clip_alone(store, rows):
    codec = MimiCodec(CODEC, 8)
    stored = load_dataset(
        "parquet", data_files=str(store / "shard-*.parquet"), split="train"
    )  # `datasets` opens the shards
    by_id = {row["id"]: row for row in rows}
    assert stored["id"] == [row["id"] for number, row in enumerate(rows) if number != 13]
    for row in stored:
        waveform = read_audio(by_id[row["id"]]["audio"]["bytes"], 24_000, max_seconds=4.0)
        assert np.array_equal(np.array(row["codes"]), codec.encode([waveform.samples_S])[0].numpy())
        assert row["duration"] == pytest.approx(waveform.seconds) and row["is_cut"] == waveform.is_cut
        assert row["text"] == by_id[row["id"]]["text"] and row["speaker"] == by_id[row["id"]]["speaker"]
        assert row["audio_warnings"] == list(waveform.audio_warnings)
    assert stored.features["codes"].feature.feature.dtype == "uint16"
    assert any(stored["is_cut"]) and not all(stored["is_cut"])


def test_the_manifest_counts_what_is_there(store):
    found, rows = manifest(store), pa.concat_tables(contents(store).values())
    assert found["codec"]["sha256"] == codec_hash(CODEC) and found["codec"]["num_quantizers"] == 8
    assert found["clips"] == len(rows) == sum(n for n, _ in found["by_second"]) == 23
    assert found["skipped"] == {"unreadable": 1}
    assert found["audio_warnings"] == {OPPOSITE: 1} and found["cut"] == sum(rows["is_cut"].to_pylist())
    seconds = rows["duration"].to_pylist()
    cut_mean = sum(min(s, 3.0) for s in seconds) / len(seconds)
    assert CodeCorpus(str(store), CODEC, 8).mean_seconds(3.0) == pytest.approx(cut_mean)
    assert found["hours"] == pytest.approx(sum(seconds) / 3600) and "torch" in found["versions"]
    assert {shard["file"]: shard["bytes"] for shard in found["shards"]} == {
        path.name: path.stat().st_size for path in store.glob("shard-*")
    }


def test_a_run_that_was_killed_finishes_on_other_ranks(store, speech, tmp_path):
    """After a kill, one shard and the manifest are missing, and one shard has a temporary name."""
    again = shutil.copytree(store, tmp_path / "store")
    (again / "manifest.json").unlink()
    (again / "shard-000001-0000-end.parquet").rename(again / ".0123.partial")
    kept = {path.name: path.stat().st_mtime_ns for path in again.glob("shard-*.parquet")}
    done = tokenize(speech, again, "--max_audio_seconds", 4, "--max_skip_fraction", 0.1)
    assert done.returncode == 0, done.output[-3000:]
    assert not list(again.glob("*.partial")) and manifest(again)["shards"] == manifest(store)["shards"]
    for name, time_ns in kept.items():
        assert (again / name).stat().st_mtime_ns == time_ns, "a finished shard is not written again"
    assert contents(again) == contents(store)


def test_a_tar_makes_several_shards_and_continues_at_the_first_missing_one(rows, store, tmp_path):
    """Shards have 8 rows; a tar of 16 rows ends with an empty shard. Two of three ranks have work."""
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in" / "0.tar", rows[:16])
    write_tar(tmp_path / "in" / "1.tar", rows[16:])
    flags = ["--max_audio_seconds", 4, "--max_skip_fraction", 0.1]
    done = tokenize(tmp_path / "in", tmp_path / "out", *flags, "--num_workers", 2, nproc=3)
    assert done.returncode == 0 and "3 ranks share 2 jobs" in done.output, done.output[-3000:]
    expected = contents(tmp_path / "out")
    sizes = {"000000-0000": 8, "000000-0001": 7, "000000-0002-end": 0, "000001-0000": 8, "000001-0001-end": 0}
    assert {name: len(table) for name, table in expected.items()} == {f"shard-{k}.parquet": n for k, n in sizes.items()}
    clips, others = (pa.concat_tables(tables.values()) for tables in (expected, contents(store)))
    assert clips.select(["id", "codes", "audio_hash"]).equals(others.select(["id", "codes", "audio_hash"]))
    assert CodeCorpus(str(tmp_path / "out"), CODEC, 8).rows_per_unit.tolist() == [8, 7, 8]
    whole = manifest(tmp_path / "out")
    for missing in (["000000-0001"], ["000000-0002-end", "000001-0000"]):
        (tmp_path / "out" / "manifest.json").unlink()
        for name in missing:
            (tmp_path / "out" / f"shard-{name}.parquet").unlink()
        run_alone("--corpus", tmp_path / "in", "--output_dir", tmp_path / "out", "--max_audio_seconds", 4)
        assert contents(tmp_path / "out") == expected and manifest(tmp_path / "out") == whole


@pytest.mark.parametrize(
    ("sizes", "clips_per_shard", "units", "rows_per_part"),
    [
        ([8] * 5, 10, [[0, 1], [2, 3], [4]], [None] * 3),
        ([3000, 100], 2048, [[0], [1]], [None] * 2),
        ([100] * 640, None, [list(range(n, n + 10)) for n in range(0, 640, 10)], [None] * 64),
        ([None, None], None, [[0], [1]], [2048] * 2),
        ([8, None, 8, 8], 100, [[0], [1], [2, 3]], [None, 100, None]),
    ],
    ids=str,
)
def test_jobs(sizes, clips_per_shard, units, rows_per_part):
    jobs = make_jobs([Unit(number, size) for number, size in enumerate(sizes)], clips_per_shard)
    assert [list(job.units) for job in jobs] == units and [job.rows_per_part for job in jobs] == rows_per_part
    assert [(job.number, job.num_bytes) for job in jobs] == list(enumerate(map(sum, units)))


def test_output_on_another_file_system(speech, store):
    run_alone("--corpus", speech, "--max_audio_seconds", 4, "--output_dir", "memory://codes/store")
    there, here = (CodeCorpus(path, CODEC, 8, with_text=True) for path in ("memory://codes/store", str(store)))
    assert there.rows_per_unit.tolist() == here.rows_per_unit.tolist()
    assert not fsspec.filesystem("memory").glob("codes/store/*.partial")
    assert [row["id"] for row in there.read(2)] == [row["id"] for row in here.read(2)]
    assert all(np.array_equal(a["codes"], b["codes"]) for a, b in zip(there.read(2), here.read(2), strict=True))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_quantizers", 4], "made with codec.num_quantizers = 8, but the current value is 4"),
        (["--corpus", TINY / "words" / "train-*.parquet"], "made with corpus_sha256 = "),
        (["--no_codec_sliding_window"], "made with codec.sliding_window = True, but the current value is False"),
        (["--max_audio_seconds", "inf"], "must be a positive number"),
        (["--max_skip_fraction", 2], "a fraction between 0 and 1"),
        (["--min_seconds", 500], "--min_seconds is 500; it must be between 0 and 4 (--max_audio_seconds)"),
        (["--max_seconds", 2, "--long_recordings", "split"], "remove one flag"),
        (["--num_workers", -1], "contradict each other; set num_workers to 1"),
        (["--where", "score > 3"], "'score' in --where is not a column of"),
        (["--output_dir", "CORPUS/codes"], "is inside the corpus"),
    ],
    ids=str,
)
def test_mistakes_get_one_sentence(flags, message, store, speech, tmp_path):
    again = shutil.copytree(store, tmp_path / "store")
    with pytest.raises(UserError) as error:
        flags = [str(flag).replace("CORPUS", str(speech)) for flag in flags]
        run_alone("--corpus", speech, "--max_audio_seconds", 4, "--output_dir", again, *flags)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert manifest(again) == manifest(store), "nothing was touched"


def test_too_many_bad_clips_stop_before_the_manifest(speech, tmp_path):
    with pytest.raises(UserError, match=r"1 of \d+ clips could not be used, more than --max_skip_fraction 0 "):
        run_alone("--corpus", speech, "--output_dir", tmp_path / "store", "--max_skip_fraction", 0)
    assert not (tmp_path / "store" / "manifest.json").exists()


def test_a_shard_of_other_rows_stops_before_the_manifest(store, speech, tmp_path):
    again = shutil.copytree(store, tmp_path / "store")
    (again / "manifest.json").unlink()
    path = again / "shard-000001-0000-end.parquet"
    shard = pq.read_table(path)
    notes = json.loads(shard.schema.metadata[b"llama_mimi"]) | {"rows": 7}
    pq.write_table(shard.replace_schema_metadata({"llama_mimi": json.dumps(notes)}), path)
    with pytest.raises(UserError, match="the shards .'shard-000001-0000-end.parquet'. are incomplete; delete"):
        run_alone("--corpus", speech, "--max_audio_seconds", 4, "--output_dir", again)


def test_duplicates_are_counted_and_dropped(rows, tmp_path):
    """The first of two duplicates is kept, also if they differ in file format, name and shard."""
    wav, samples = io.BytesIO(), soundfile.read(io.BytesIO(rows[1]["audio"]["bytes"]), dtype="float32")
    soundfile.write(wav, *samples, format="WAV", subtype="FLOAT")
    again = [{**rows[1], "id": "b1", "audio": {"bytes": wav.getvalue()}}, {**rows[14], "id": "b0"}]
    (tmp_path / "in").mkdir()
    for number, row in enumerate([rows[14], *rows[1:3], *again]):
        write_tar(tmp_path / "in" / f"{number}.tar", [row])

    def made(folder, *flags):
        run_alone("--corpus", tmp_path / "in", "--output_dir", tmp_path / folder, *flags)
        found, stored = manifest(tmp_path / folder), pa.concat_tables(contents(tmp_path / folder).values())
        assert found["clips"] == len(stored) == sum(number for number, _ in found["by_second"])
        assert found["hours"] * 3600 == pytest.approx(sum(stored["duration"].to_pylist()))
        return found, stored.to_pylist()

    kept, everything = made("kept")
    assert kept["duplicates_kept"] == 2 and kept["clips"] == 5 and kept["filtered"] == {}
    assert kept["audio_warnings"] == {OPPOSITE: 2}
    dropped, stored = made("dropped", "--duplicates", "drop")
    assert dropped["duplicates_kept"] == 0 and dropped["filtered"] == {"duplicate": 2}
    assert stored == everything[:3] and dropped["audio_warnings"] == {OPPOSITE: 1}
    for job in (4, 0):  # the shard of a duplicate, and the shard of its first copy
        (tmp_path / "dropped" / "manifest.json").unlink()
        (tmp_path / "dropped" / f"shard-{job:06d}-0000-end.parquet").unlink()
        assert made("dropped", "--duplicates", "drop") == (dropped, stored)
    with pytest.raises(UserError, match="made with duplicates = 'drop', but the current value is 'keep'"):
        made("dropped")


def test_two_runs_do_not_share_an_output(speech, tmp_path):
    """The lock of another process is respected."""
    code = f"import fcntl; file = open('{tmp_path}/.lock', 'w'); fcntl.lockf(file, 2); print(1, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout.readline()
        with pytest.raises(UserError, match="another process writes to .* choose another --output_dir"):
            run_alone("--corpus", speech, "--output_dir", tmp_path)


# Training from codes


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


@pytest.mark.parametrize("task", ["audio", "tts"])
@pytest.mark.parametrize(("packing", "num_quantizers"), [("pad", 1), ("pad", 8), ("pack", 4)])
def test_shards_give_the_batches_that_audio_gives(packing, num_quantizers, task, store, speech, world_of_one):
    """Codes and audio give equal batches for any number of levels. The limit of 3.2 s cuts most clips."""
    flags = ["--codec.num_quantizers", num_quantizers, "--data.packing", packing, "--data.tasks", task]
    loaders = []
    for dataset in (store, speech):
        job_config = config(dataset, *flags, "--data.max_skip_fraction", 1)
        loaders.append(build_dataloader(1, 0, build_speech_tokenizer(job_config), job_config, is_validation=True))
    pairs = list(zip(*loaders, strict=True))
    assert pairs
    for (inputs, labels_BL), (others, other_labels_BL) in pairs:
        assert inputs["input"].equal(others["input"]) and labels_BL.equal(other_labels_BL)
        assert ("positions" in inputs) == (packing == "pack")


def test_each_validation_corpus_has_its_own_clips(store, tmp_path, tokenizer, world_of_one):
    """The texts of the task 'text' belong to the first corpus. A corpus without transcripts is not used for 'tts'."""
    (tmp_path / "texts.txt").write_text("one\ntwo\n")
    texts = ["--data.text_dataset", tmp_path / "texts.txt", "--data.validation_text_dataset", tmp_path / "texts.txt"]
    without_text, twin = str(write_store(tmp_path / "old", [12] * 5)), tmp_path / "twin" / store.name
    flags = ["--data.tasks", "audio,tts,text", *texts, "--data.validation_clips", 3, "--training.dataset", store]
    job_config = config(f"{store}, {without_text}", *flags)
    found = {}
    for corpus in (str(store), without_text):
        loader = build_dataloader(1, 0, tokenizer, job_config, is_validation=True, corpus=corpus)
        found[corpus] = Counter(loader.streams[ref.stream].task for ref, _ in loader._clips())
    assert found == {str(store): {"audio": 3, "tts": 3, "text": 2}, without_text: {"audio": 3}}
    job_config = config(f"{store}, {without_text}", "--data.tasks", "tts")
    with pytest.raises(UserError, match="'.*/old' lacks the columns for data.tasks; remove it from validation.dataset"):
        build_dataloader(1, 0, tokenizer, job_config, is_validation=True, corpus=without_text)
    shutil.copytree(store, twin)
    for name in (twin, shutil.copytree(store, tmp_path / "tts")):
        with pytest.raises(
            UserError, match="rename folders until their names differ from each other and from data.tasks"
        ):
            config(f"{store},{name}", "--training.dataset", store, "--data.tasks", "tts")


def test_a_mixture_has_the_shares_of_audio_asked_for(store, tmp_path, tokenizer, world_of_one):
    short = write_store(tmp_path / "short", [12] * 40)
    flags = ["--validation.no-enable", "--data.weights", 1.0, 3.0, "--data.packing", "pack"]
    loader = build_dataloader(1, 0, tokenizer, config(f"{store}, {short}", *flags))
    seconds = Counter()
    for ref, clip in loader._clips():
        seconds[ref.stream] += len(clip.codes_TQ) / 12.5
        if sum(seconds.values()) > 600:
            break
    # the limit of 3.2 s shortens some clips
    assert seconds[1] / sum(seconds.values()) == pytest.approx(0.75, abs=0.03)


def write_store(folder, lengths):
    """Write a folder of random codes."""
    return Path(write_codes(folder, CODEC, [random_clips(np.array(lengths), load_codec_config(CODEC, 8))]))


def edit(in_codec=False, **changes):
    """Return a function that changes values in the manifest of a folder, or in the entry "codec" of the manifest."""

    def change(folder):
        found = manifest(folder)
        (found["codec"] if in_codec else found).update(changes)
        (folder / "manifest.json").write_text(json.dumps(found))

    return change


def truncate(folder):
    path = min(folder.glob("shard-*.parquet"))
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "bytes, not"),
        (lambda folder: max(folder.glob("shard-*")).unlink(), "shard-000002-0000-end.parquet"),
        (lambda folder: (folder / "manifest.json").unlink(), "the tokenisation is not finished"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "is not readable as JSON"),
        (edit(format=1), "has format 1, not 2; tokenise the corpus again"),
        (edit(in_codec=True, sha256="0" * 64), "codec.sha256 = '000000000000"),
        (edit(in_codec=True, num_quantizers=2), "has 2 levels, fewer than codec.num_quantizers = 4"),
        (edit(in_codec=True, sliding_window=False), "sliding_window = False, but the current value is True"),
        (edit(columns=["id", "codes"]), "does not contain text"),
    ],
    ids="truncated missing unfinished json format codec levels attention text".split(),
)
def test_damaged_stores_are_refused_at_the_start(damage, message, store, tmp_path, world_of_one):
    folder = shutil.copytree(store, tmp_path / "store")
    damage(folder)
    with pytest.raises(UserError) as error:
        config(folder, "--data.tasks", "tts")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_store_is_a_folder_by_tokenisation_and_has_no_splits(store, tmp_path, world_of_one):
    (tmp_path / "manifest.json").write_text('{"audio_filepath": "a.wav"}\n{"audio_filepath": "b.wav"}\n')
    assert not is_store(str(tmp_path)) and not is_store("peoples_speech")
    with pytest.raises(UserError, match="tokenised corpus without splits; remove training.dataset_path and data.split"):
        config(store, "--data.split", "train")


def test_a_flipped_bit_is_found(tmp_path, tokenizer, world_of_one):
    """The checksums of the Parquet pages find the damage, although the file's size and footer are unchanged."""
    folder = write_store(tmp_path / "store", [50] * 20)
    path = folder / "shard-000000.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10  # in the codes
    path.write_bytes(content)
    for num_workers in (0, 1):
        loader = build_dataloader(1, 0, tokenizer, config(folder, "--training.dataloader.num_workers", num_workers))
        with pytest.raises(UserError, match="not a readable Parquet file") as error:
            next(iter(loader))
        assert "Traceback" not in str(error.value)


def test_codes_outside_the_codebook_are_refused(tmp_path):
    folder = write_store(tmp_path / "store", [10, 20])
    content = manifest(folder)
    content["codec"]["codebook_size"] = 200
    (folder / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"contains the code 2\d\d, outside the codebook of 200"):
        CodeCorpus(str(folder), CODEC, 4).read(0)
