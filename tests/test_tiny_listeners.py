"""Training and errors of the offline ASR model and speaker encoder."""

import json

import numpy as np
import pytest
import torch
from conftest import TINY
from scipy import stats
from score_listeners import equal_error_rate, score_listeners, word_errors
from tiny_codec import LabelledClip
from train_tiny_listeners import RECIPES, train_listener

from llama_mimi.judging.metrics import speaker_encoder, transcripts
from llama_mimi.judging.systems import Clip

HELD_OUT = str(TINY / "corpus" / "validation-*.parquet")
PROMPT = Clip(TINY / "prompt.wav")


@pytest.mark.parametrize("listener", ["recogniser", "speaker_encoder"])
def test_a_few_steps_make_what_transformers_loads(listener, tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPES, listener, (2, 2, 1e-3))
    train_listener(listener, HELD_OUT, tmp_path)
    again = tmp_path / "again"
    train_listener(listener, HELD_OUT, again)
    assert (again / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    assert json.loads((tmp_path / "training.json").read_text())["clips"] == 47
    if listener == "recogniser":
        asr = transcripts(str(tmp_path), None, torch.device("cpu"), 1)
        assert isinstance(next(iter(asr.compute([(PROMPT,)])))["text"], str)
    else:
        assert speaker_encoder(str(tmp_path), torch.device("cpu"))(PROMPT).shape == (128,)


@pytest.mark.parametrize(
    ("same", "different", "expected"),
    [([0.2, 0.6, 0.7, 0.8], [0.1, 0.3, 0.4, 0.65], 0.25), ([1, 2, 3, 4], [1, 2, 3, 4], 0.5), ([0, 1], [2, 3], 1.0)],
)
def test_equal_error_rate(same, different, expected):
    assert equal_error_rate(np.array(same), np.array(different)) == expected


def test_the_interval_of_a_word_error_rate_belongs_to_this_rate():
    """Compare with the variance of a ratio. The mean of the clips' rates is 19/36 instead of 5/9."""
    spoken, found = ["one two", "three four five", "six seven eight nine"], ["one one", "three four six", "six six"]
    clips = [LabelledClip(torch.zeros(1), "", text) for text in spoken]
    errors_N, words_N = np.array([1, 1, 3]), np.array([2, 3, 4])
    rate = 5 / 9
    error = np.sqrt(np.sum((errors_N - rate * words_N) ** 2) / (3 * 2)) / 3
    expected = stats.t.interval(0.95, 2, loc=rate, scale=error)
    scores = word_errors(clips, found)
    assert scores["word_error_rate"] == pytest.approx(rate) and scores["interval"] == pytest.approx(expected)


@pytest.mark.slow
def test_the_committed_listeners_hear_held_out_speech(tmp_path, capsys):
    """The expected table is in assets/tiny/recogniser/README.md. Models within these bounds are useful."""
    folders = [str(TINY / name) for name in ("recogniser", "speaker_encoder", "mimi")]
    score_listeners(HELD_OUT, *folders, output_file=tmp_path / "listeners.json")
    rows = json.loads((tmp_path / "listeners.json").read_text())["rows"]
    assert rows["original"]["word_error_rate"] < 0.3 and rows["original"]["equal_error_rate"] < 0.2
    assert rows["8 levels"]["word_error_rate"] < rows["1 level"]["word_error_rate"]
    readme = (TINY / "recogniser" / "README.md").read_text()
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert all(line in readme for line in printed)
