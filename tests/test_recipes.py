"""The commands of config/CORPORA.md, run on a few clips in the layout of each published corpus."""

import io
import json
import re
import shlex
import tarfile
import tempfile
import tomllib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from conftest import ROOT, TINY
from forked_ranks import ForkedRanks
from layouts import add, lossless_rows

from llama_mimi.audio.mimi import load_codec_config
from llama_mimi.audio.reading import read_audio

PAGE = ROOT / "config" / "CORPORA.md"
CODEC = str(TINY / "mimi")
SECONDS_OF_A_SESSION, SESSION = 45.0, "20181024-0900-PLENARY_en"


@pytest.fixture(scope="module")
def rows():
    return lossless_rows(str(TINY / "corpus" / "validation-*.parquet"), 16, 3.0)


def written(samples_S, rate_hz, kind):
    stream = io.BytesIO()
    soundfile.write(stream, samples_S, rate_hz, format=kind)
    return stream.getvalue()


def session(rows, rate_hz):
    """Return a long recording: all clips, separated by pauses."""
    parts = [np.append(read_audio(row["bytes"], rate_hz).samples_S.numpy(), np.zeros(rate_hz // 2)) for row in rows]
    return np.concatenate(parts)[: round(SECONDS_OF_A_SESSION * rate_hz)]


def libri_light(folder, rows):
    place = folder / "libri_light" / "small" / "100" / "sea_fairies_0812_librivox_64kb_mp3"
    place.mkdir(parents=True)
    (place / "01_baum_sea_fairies_64kb.flac").write_bytes(written(session(rows, 16_000), 16_000, "FLAC"))
    book = {"id": "2484", "title": "Sea Fairies", "genre": ["Children's Fiction"], "Dramatic Readings": False}
    said = {"speaker": "100", "book_meta": book, "snr": 9.5, "voice_activity": [[0.4, 12.3], [14.0, 16.5]]}
    (place / "01_baum_sea_fairies_64kb.json").write_text(json.dumps(said))


def peoples_speech(folder, rows):
    for config, chosen in {"clean": rows[:4], "dirty_sa": rows[3:7]}.items():  # one clip is in both
        names = [f"gov_DOT_item/gov_DOT_item_DOT_mp3_0000{number}.flac" for number in range(4)]
        table = [
            {"id": name, "audio": {"bytes": row["bytes"], "path": name}, "duration_ms": 3000, "text": row["text"]}
            for name, row in zip(names, chosen, strict=True)
        ]
        place = folder / "peoples_speech" / config
        place.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(table), place / "train-00000-of-00804.parquet")
    (folder / "peoples_speech" / "validation").mkdir()
    pq.write_table(pa.Table.from_pylist(table), folder / "peoples_speech/validation/validation-00000-of-00005.parquet")


def voxpopuli(folder, rows):
    place = folder / "voxpopuli" / "en" / "2018"
    place.mkdir(parents=True)
    (place / f"{SESSION}.ogg").write_bytes(written(session(rows, 16_000), 16_000, "OGG"))


def emilia(folder, rows):
    for part, row_id in {"Emilia": "id", "Emilia-YODAS": "_id"}.items():
        place = folder / "emilia" / part / "EN"
        place.mkdir(parents=True)
        with tarfile.open(place / "EN-B000000.tar", "w") as tar:
            for number, row in enumerate(rows[:3]):
                key = f"EN_B00000_S00000_W00000{number}"
                samples = np.roll(read_audio(row["bytes"], 24_000).samples_S.numpy(), 100 * (part == "Emilia"))
                said = {row_id: key, "text": f" {row['text']}", "duration": 3.0, "speaker": f"EN_{number}"}
                said |= {"language": "en" if number else "de", "dnsmos": 3.2927}
                add(tar, f"{key}.mp3", written(samples, 24_000, "MP3"))
                add(tar, f"{key}.json", json.dumps(said).encode())


def yodas(folder, rows):
    """Each recording has one row for each order; a character contains the level and the code."""
    place, codebook_size = folder / "yodas2-mm-pretrain" / "en000", load_codec_config(CODEC, 8).codebook_size
    place.mkdir(parents=True)
    codes = "".join(chr(0xE000 + level * codebook_size + 5) for _ in range(30) for level in range(8))
    text, audio = "<|text_start|>some words<|text_end|>", f"<|audio_start|>{codes}<|audio_end|>"
    orders = {"a_type1": text + audio + text + audio, "a_type2": audio + text + audio + text}
    content = {name: f"<|begin_of_text|>{order}<|end_of_text|>" for name, order in orders.items()}
    table = [{"id": name, "split": "en000/00000000", "text": text} for name, text in content.items()]
    pq.write_table(pa.Table.from_pylist(table), place / "00000000.parquet")


def librispeech(folder, rows):
    place = folder / "librispeech_asr" / "clean" / "validation"
    place.mkdir(parents=True)
    labels = {"text": "MISTER QUILTER", "speaker_id": 1272, "chapter_id": 128104}
    table = [{"id": f"1272-{n}", "audio": {"bytes": row["bytes"], "path": "a"}} | labels for n, row in enumerate(rows)]
    pq.write_table(pa.Table.from_pylist(table[:3]), place / "0000.parquet")


# For each corpus: a writer, the filtered clips in the manifest, and a check of a row.
PUBLISHED = {
    "libri_light": (libri_light, {}, lambda row: row["speaker"] == "100" and "text" not in row),
    "peoples_speech_all": (peoples_speech, {"duplicate": 1}, lambda row: bool(row["text"])),
    "voxpopuli_en": (voxpopuli, {}, lambda row: "text" not in row and row["id"].startswith(f"en/2018/{SESSION}_0000")),
    "emilia_en": (
        emilia,
        {'not language == "en"': 2},
        lambda row: row["text"][0] == " " and row["speaker"][:3] == "EN_",
    ),
    "yodas_en": (
        yodas,
        {"second row of a recording": 1},
        lambda row: row["text"] == "some words" and row["speaker"] == "a" and np.all(np.array(row["codes"]) == 5),
    ),
    "librispeech_dev_clean": (
        librispeech,
        {},
        lambda row: row["text"] == "MISTER QUILTER" and row["speaker"] == "1272",
    ),
}
LONG_RUNS = ("libri_light", "peoples_speech_all", "voxpopuli_en", "emilia_en")


def recipes():
    """Return the commands of the page that write codes as lists of words, by the name of the output folder."""
    text = PAGE.read_text().replace("\\\n", " ")
    commands = [shlex.split(line) for line in re.findall(r"^uv run torchrun .*$", text, re.M)]
    return {
        Path(words[words.index("--output_dir") + 1]).name: words[next(i for i, w in enumerate(words) if "/" in w) :]
        for words in commands
    }


def test_the_long_runs_train_on_what_the_recipes_make():
    for name in ("llama3_2_1b", "llama3_2_1b_hierarchical", "llama3_1_8b"):
        config = tomllib.loads((ROOT / "config" / f"{name}.toml").read_text())
        folders = [part.strip() for part in config["training"]["dataset"].split(",")]
        assert {Path(folder).name for folder in folders} == {*LONG_RUNS}
        assert all(f"`{folder}`" in PAGE.read_text() for folder in folders)
    config = (ROOT / "config" / "llama3_2_1b_text_speech.toml").read_text()
    assert {*re.findall("data/codes/(\\w+)", config)} == PUBLISHED.keys() - {"voxpopuli_en"}
    assert recipes().keys() == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_on_what_is_published(rows, name, tmp_path):
    publish, left_out, is_right = PUBLISHED[name]
    publish(tmp_path / "data", rows)
    words = [re.sub(r"^data/", f"{tmp_path}/data/", word) for word in recipes()[name]]
    with tempfile.TemporaryDirectory() as folder:
        ranks = ForkedRanks(2, [*words, "--codec", CODEC, "--num_workers", "1"], Path(folder) / "log")
        assert ranks.wait(240) == 0, ranks.output[-3000:]
    output = tmp_path / "data" / "codes" / name
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["skipped"] == manifest["audio_warnings"] == {} and manifest["filtered"] == left_out
    stored = pq.read_table(sorted(output.glob("shard-*.parquet"))).to_pylist()
    for row in stored:
        assert row["duration"] <= 20 and is_right(row), row
    if "split" in words:
        assert sum(row["duration"] for row in stored) == pytest.approx(SECONDS_OF_A_SESSION, abs=0.01)
        assert len(stored) >= 3 and [row["is_cut"] for row in stored] == [True] * (len(stored) - 1) + [False]
    else:
        assert len(stored) == {"peoples_speech_all": 7, "emilia_en": 4, "yodas_en": 2, "librispeech_dev_clean": 3}[name]
