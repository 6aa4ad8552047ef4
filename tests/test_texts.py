"""Text corpora, and consecutive utterances of a tokenised corpus."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import TINY
from simulated import random_clips, write_codes

from llama_mimi.audio.mimi import load_codec_config
from llama_mimi.common.errors import UserError
from llama_mimi.corpora.clips import SkippedClip, TextCorpus
from llama_mimi.corpora.utterances import UtteranceCorpus


def documents(corpus):
    return [
        clip for unit in range(len(corpus.rows_per_unit)) for row in corpus.read(unit) for clip in corpus.clips(row)
    ]


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_every_document_is_read_once(tmp_path, kind):
    texts = [f"document {number}\u00e9" for number in range(250)]
    if kind == "txt":
        (tmp_path / "a[1].txt").write_text("\n".join(texts[:120]) + "\r\n\n", encoding="utf-8")
        (tmp_path / "b.txt").write_text("\n".join(texts[120:]), encoding="utf-8")
    elif kind == "jsonl":
        (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": text, "n": 1}) + "\n" for text in texts))
    else:
        pq.write_table(pa.table({"body": texts, "n": range(250)}), tmp_path / "a.parquet")
    corpus = TextCorpus(str(tmp_path), "body")
    found = [clip.text for clip in documents(corpus)]
    assert found == texts
    assert TextCorpus(str(tmp_path), "body").fingerprint == corpus.fingerprint


def test_a_document_without_text_is_skipped_and_a_wrong_column_is_named(tmp_path):
    pq.write_table(pa.table({"body": ["one", None]}), tmp_path / "a.parquet")
    one, none = documents(TextCorpus(str(tmp_path), "body"))
    assert one.text == "one" and isinstance(none, SkippedClip) and none.is_filtered
    with pytest.raises(UserError, match="lacks the column 'text' for the text"):
        TextCorpus(str(tmp_path), "text")
    with pytest.raises(UserError, match="does not match any Parquet, tar, audio, JSONL or text file"):
        TextCorpus(str(tmp_path / "empty"), "text")


def test_runs_of_utterances_end_at_another_speaker_and_at_unusable_clips(tmp_path):
    """Blocks of 16 clips; the clips of a run are consecutive and have the same speaker."""
    codec = str(TINY / "mimi")
    speakers = ["a"] * 5 + ["b"] * 9 + [None] * 2 + ["b"] * 4
    rows = random_clips(np.full(20, 3), load_codec_config(codec, 8))
    rows = [replace(clip, text=clip.name, speaker=own) for clip, own in zip(rows, speakers, strict=True)]
    rows[2], rows[7] = replace(rows[2], text=None), replace(rows[7], is_cut=True)
    folder = write_codes(tmp_path / "codes", codec, [rows], ["text", "speaker"])
    corpus = UtteranceCorpus(folder, codec, 4, with_text=True)
    found = documents(corpus)
    assert corpus.rows_per_unit.tolist() == [2]
    names = [[[int(clip.name.removeprefix("clip-")) for clip in run] for run in block.runs] for block in found]
    assert names == [[[0, 1], [3, 4], [5, 6], [8, 9, 10, 11, 12, 13], [14], [15]], [[16, 17, 18, 19]]]
    assert [bool(block.audio_warnings) for block in found] == [True, False]
    with pytest.raises(UserError, match="does not contain speakers; tokenise the corpus again"):
        UtteranceCorpus(write_codes(tmp_path / "other", codec, [rows], ["text"]), codec, 4, with_text=True)
