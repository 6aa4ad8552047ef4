"""Importing codes that are stored as text: equal to tokenised audio, checked, resumable and trainable."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import tyro
from conftest import TINY
from simulated import text_from_codes

from llama_mimi.audio.mimi import load_codec_config
from llama_mimi.common.errors import UserError
from llama_mimi.corpora.code_shards import CodeCorpus
from llama_mimi.corpora.options import ImportOptions, TokenizationOptions
from llama_mimi.corpora.tokenize import tokenize_corpus
from llama_mimi.corpora.utterances import UtteranceCorpus

CODEC = str(TINY / "mimi")
K = load_codec_config(CODEC, 8).codebook_size
BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"


def characters(codes_TQ):
    """Return codes as SODA's characters, in a plain loop."""
    return "".join(chr(0xE000 + level * K + code) for frame in codes_TQ for level, code in enumerate(frame))


def recording(utterances, kind=1):
    """Return a row of SODA's corpora from (text, codes) of each utterance; kind 2: audio first."""
    parts = []
    for text, codes_TQ in utterances:
        sections = [f"<|text_start|>{text}<|text_end|>", f"<|audio_start|>{characters(codes_TQ)}<|audio_end|>"]
        parts += sections[:: 1 if kind == 1 else -1]
    return BEGIN + "".join(parts) + END


def write(path, rows, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def run(kind, *flags):
    words = ["--codec", CODEC, "--num_workers", 0, *flags]
    tokenize_corpus(tyro.cli(kind, args=[*map(str, words)], use_underscores=True))


def import_codes(corpus, output_dir, *flags, layout="soda"):
    column = ["--codes_column", "text"] if layout == "soda" else []
    words = ["--corpus", corpus, "--output_dir", output_dir, "--layout", layout, *column, *flags]
    run(ImportOptions, "--codec_sliding_window", "True", *words)


def stored(folder):
    return pa.concat_tables(map(pq.read_table, sorted(Path(folder).glob("shard-*.parquet")))).to_pylist()


def manifest(folder):
    return json.loads((Path(folder) / "manifest.json").read_text())


@pytest.fixture(scope="module")
def tokenised(tmp_path_factory):
    """Return the folder that tokenize_corpus.py writes for 12 clips of the tiny corpus."""
    folder = tmp_path_factory.mktemp("tokenised")
    rows = pq.read_table(TINY / "corpus" / "validation-00000-of-00001.parquet").slice(0, 12)
    pq.write_table(rows, folder / "clips.parquet")
    run(TokenizationOptions, "--corpus", folder / "clips.parquet", "--output_dir", folder / "codes")
    return folder / "codes"


def test_imported_tokens_equal_tokenised_audio(tokenised, tmp_path):
    clips = stored(tokenised)
    for clip in clips:
        clip["codes"] = text_from_codes(torch.tensor(clip["codes"]))
    write(
        tmp_path / "in" / "clips.parquet",
        [{key: clip[key] for key in "id codes text speaker".split()} for clip in clips],
    )
    import_codes(tmp_path / "in", tmp_path / "out", layout="tokens")
    imported, made = stored(tmp_path / "out"), stored(tokenised)
    same = "id codes is_cut text speaker audio_warnings".split()
    assert [[row[key] for key in same] for row in imported] == [[row[key] for key in same] for row in made]
    assert all(0 <= a["duration"] - b["duration"] < 0.08 for a, b in zip(imported, made, strict=True))
    found, other = manifest(tmp_path / "out"), manifest(tokenised)
    assert found["codec"] == other["codec"] and found["columns"] == other["columns"] and found["skipped"] == {}
    assert found["layout"] == "tokens" and found["corpus"] == str(tmp_path / "in") and found["resampler"] is None
    a, b = (CodeCorpus(str(folder), CODEC, 4, with_text=True) for folder in (tmp_path / "out", tokenised))
    for one, other in zip(a.read(0), b.read(0), strict=True):  # training reads equal codes
        assert one["id"] == other["id"] and np.array_equal(one["codes"], other["codes"])


def random_codes(frames, seed):
    return np.random.default_rng(seed).integers(0, K, (frames, 8))


def test_recordings_of_soda(tmp_path):
    """Extreme codes of each level survive; the second row of a recording is not read; utterances keep their order."""
    codes = [random_codes(frames, frames) for frames in (7, 1, 25)]
    codes[1][:] = [0, K - 1] * 4
    utterances = [("first", codes[0]), (" second\nline ", codes[1])]
    rows = [{"id": f"a_type{kind}", "split": "en000/0", "text": recording(utterances, kind)} for kind in (1, 2)]
    rows.append({"id": "b_type1", "split": "en000/0", "text": recording([("", codes[2])])})
    write(tmp_path / "in" / "0.parquet", rows)
    import_codes(tmp_path / "in", tmp_path / "out", "--codec_sliding_window", "unknown")
    found, imported = manifest(tmp_path / "out"), stored(tmp_path / "out")
    labels = [(row["id"], row["text"], row["speaker"], row["duration"]) for row in imported]
    assert labels == [
        ("a_type1_00000", "first", "a", pytest.approx(0.56)),
        ("a_type1_00001", "second\nline", "a", pytest.approx(0.08)),
        ("b_type1_00000", None, "b", pytest.approx(2.0)),
    ]
    assert all(np.array_equal(row["codes"], codes_TQ) for row, codes_TQ in zip(imported, codes, strict=True))
    assert found["filtered"] == {"second row of a recording": 1} and found["codec"]["sliding_window"] == "unknown"
    for sliding_window in (True, False):  # training accepts unknown codes with any setting
        assert CodeCorpus(str(tmp_path / "out"), CODEC, 4, sliding_window).rows_per_unit.tolist() == [3]
    corpus = UtteranceCorpus(str(tmp_path / "out"), CODEC, 4, with_text=True)  # of the task "interleaved"
    (block,) = corpus.clips(corpus.read(0)[0])
    assert [[clip.text for clip in run] for run in block.runs] == [["first", "second\nline"]]


GOOD = random_codes(3, 0)


def changed(position, change):
    """Return SODA's row of `GOOD` with one character shifted."""
    text = characters(GOOD)
    other = text[:position] + chr(ord(text[position]) + change) + text[position + 1 :]
    return recording([("text", GOOD)]).replace(text, other)


TWO_TEXTS = recording([("text", GOOD)]).replace("<|text_start|>", "<|text_start|>no codes<|text_end|><|text_start|>")


@pytest.mark.parametrize(
    ("layout", "content", "message"),
    [
        ("soda", changed(10, K), "code 10 has level 3 instead of 2"),
        ("soda", changed(7, K), "code 7 has level 8 instead of 7"),
        ("soda", recording([("text", GOOD)]).replace(characters(GOOD[-1:]), ""), None),
        ("soda", recording([("text", GOOD)]).replace(characters(GOOD)[-1], ""), "of 23 codes does not have"),
        ("soda", recording([("text", GOOD[:0])]), "of 0 codes does not have"),
        ("soda", recording([("text", GOOD)]).replace("<|audio_end|>", ""), "not a sequence of transcripts and codes"),
        ("soda", "plain text", "not a sequence of transcripts and codes"),
        ("soda", TWO_TEXTS, "not a sequence of transcripts and codes"),
        ("soda", None, "not a sequence of transcripts and codes"),
        ("tokens", "<audio><5_0></audio>", "of 1 codes does not have one or more whole frames of 8 levels"),
        ("tokens", "<audio><5_1></audio>", "code 0 has level 1 instead of 0"),
        ("tokens", "<audio>" + "".join(f"<{K}_{q}>" for q in range(8)) + "</audio>", f"{K} is outside the codebook"),
        ("tokens", "<audio><5_0>", "its content is not <audio><c_q>...</audio>"),
        ("tokens", "<audio></audio>", "of 0 codes does not have"),
    ],
)
def test_unusable_codes_are_counted_and_named(layout, content, message, tmp_path, capsys):
    good = recording([("good", GOOD)]) if layout == "soda" else text_from_codes(torch.tensor(GOOD))
    column = "text" if layout == "soda" else "codes"
    rows = [{"id": "good", column: good}, {"id": "bad", column: content}]
    write(tmp_path / "in" / "0.parquet", rows)
    import_codes(tmp_path / "in", tmp_path / "out", layout=layout)
    if message is None:
        assert [len(row["codes"]) for row in stored(tmp_path / "out")] == [3, 2]
        return
    assert manifest(tmp_path / "out")["skipped"] == {"unusable codes": 1}
    assert re.search(rf"skipped: 'bad' cannot be used: .*{re.escape(message)}", capsys.readouterr().out)
    assert np.array_equal(stored(tmp_path / "out")[0]["codes"], GOOD) and manifest(tmp_path / "out")["clips"] == 1
    with pytest.raises(UserError, match="'bad' cannot be used"):
        import_codes(tmp_path / "in", tmp_path / "none", "--max_skip_fraction", 0, layout=layout)


def test_an_import_is_resumed_and_refuses_other_settings(tmp_path):
    generator = random.Random(0)
    rows = [
        {"id": f"{n}_type1", "text": recording([(f"{n}", random_codes(generator.randint(1, 9), n))] * 2)}
        for n in range(9)
    ]
    write(tmp_path / "in" / "0.parquet", rows, row_group_size=3)
    flags = ["--clips_per_shard", 3]
    import_codes(tmp_path / "in", tmp_path / "out", *flags)
    expected, whole = stored(tmp_path / "out"), manifest(tmp_path / "out")
    assert len(whole["shards"]) == 3 and whole["clips"] == 18 and whole["duplicates_kept"] == 9
    (tmp_path / "out" / "manifest.json").unlink()
    (tmp_path / "out" / "shard-000001-0000-end.parquet").unlink()
    import_codes(tmp_path / "in", tmp_path / "out", *flags)
    assert stored(tmp_path / "out") == expected and manifest(tmp_path / "out") == whole
    with pytest.raises(UserError, match="made with codec.sliding_window = True, but the current value is 'unknown'"):
        import_codes(tmp_path / "in", tmp_path / "out", *flags, "--codec_sliding_window", "unknown")
    with pytest.raises(UserError, match="lacks the column 'units'; set --codes_column"):
        import_codes(tmp_path / "in", tmp_path / "new", "--codes_column", "units")
