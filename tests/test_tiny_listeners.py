"""The offline recogniser and speaker encoder: how they are trained, and what the committed ones hear."""

import json
import math

import numpy as np
import pytest
import torch
import train_tiny_listeners
from conftest import TINY
from score_listeners import equal_error_rate, score_listeners
from train_tiny_listeners import (
    FREQUENCIES_HZ,
    RATE_HZ,
    SPEEDS,
    ListenerFlags,
    at_speeds,
    set_filter_bank,
    spelled,
    train_listener,
    with_noise,
)

from llama_mimi.common.errors import UserError
from llama_mimi.judging.metrics import speaker_encoder, transcripts
from llama_mimi.judging.systems import Clip

HELD_OUT = str(TINY / "corpus" / "validation-*.parquet")
PROMPT = Clip(TINY / "prompt.wav")


def test_the_first_layer_tells_frequencies_apart():
    weight_C1K = torch.empty(160, 1, 400)
    set_filter_bank(weight_C1K)
    spectrum_CF = torch.fft.rfft(weight_C1K[:, 0]).abs()
    peaks_hz = spectrum_CF.argmax(dim=1).view(-1, 4) * RATE_HZ / 400
    assert ((peaks_hz - peaks_hz[:, :1]).abs() <= RATE_HZ / 400).all()  # a bin of the spectrum
    assert (peaks_hz.mean(dim=1).diff() >= 0).all()
    assert abs(peaks_hz[0, 0] - FREQUENCIES_HZ[0]) <= 40 and abs(peaks_hz[-1, 0] - FREQUENCIES_HZ[1]) <= 40
    # The energy of a tone does not depend on its phase.
    waves = [torch.cos(2 * math.pi * 1000 * torch.arange(400) / RATE_HZ + phase) for phase in (0.0, 1.0, 2.0)]
    energies = [(weight_C1K[:, 0] @ wave).relu().square().view(-1, 4).sum(dim=1).max() for wave in waves]
    assert max(energies) / min(energies) < 1.05


def test_clips_are_noisy_and_of_three_speeds():
    torch.manual_seed(0)
    clip = train_tiny_listeners.LabelledClip(torch.sin(torch.arange(16_000) / 4), "a", "One two!")
    assert [len(one.samples_S) for one, _ in at_speeds([clip])] == [round(16_000 / speed) for speed in SPEEDS]
    noisy = [with_noise(clip.samples_S) for _ in range(2)]
    assert not torch.equal(*noisy)
    assert all(abs(one.mean()) < 1e-3 and one.std() == pytest.approx(1, abs=1e-3) for one in noisy)
    assert spelled("  The BAKER's bun, then ") == "the baker's bun then"


@pytest.mark.parametrize("listener", ["recogniser", "speaker_encoder"])
def test_a_few_steps_make_what_transformers_loads(listener, tmp_path):
    train_listener(ListenerFlags(listener, HELD_OUT, tmp_path, steps=2, batch_size=2))
    again = tmp_path / "again"
    train_listener(ListenerFlags(listener, HELD_OUT, again, steps=2, batch_size=2))
    assert (again / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    assert json.loads((tmp_path / "training.json").read_text())["clips"] == 47
    if listener == "recogniser":
        asr = transcripts(str(tmp_path), None, torch.device("cpu"), 1)
        assert isinstance(next(iter(asr.compute([(PROMPT,)])))["text"], str)
    else:
        assert speaker_encoder(str(tmp_path), torch.device("cpu"))(PROMPT).shape == (128,)


def test_a_rate_that_is_too_high_is_said(tmp_path):
    with pytest.raises(UserError, match="the loss of step . is .*; lower --learning_rate 1e\\+30"):
        train_listener(ListenerFlags("recogniser", HELD_OUT, tmp_path, steps=5, batch_size=2, learning_rate=1e30))


@pytest.mark.parametrize(
    ("same", "different", "expected"),
    [
        ([0.9, 0.8], [0.1, 0.2, 0.3], 0.0),
        ([0.1, 0.2], [0.8, 0.9], 1.0),
        ([0.2, 0.6, 0.7, 0.8], [0.1, 0.3, 0.4, 0.65], 0.25),
        ([1, 2, 3, 4], [1, 2, 3, 4], 0.5),
    ],
)
def test_equal_error_rate(same, different, expected):
    assert equal_error_rate(np.array(same), np.array(different)) == expected


def test_the_equal_error_rate_of_two_bells():
    """Two normal distributions at a distance of two deviations: a sixth of each lies beyond the middle."""
    random = np.random.default_rng(0)
    found = equal_error_rate(random.normal(2, 1, 20_000), random.normal(0, 1, 30_000))
    assert found == pytest.approx(0.5 * math.erfc(1 / math.sqrt(2)), abs=0.01)


@pytest.mark.slow
def test_the_committed_listeners_hear_held_out_speech(tmp_path, capsys):
    """Golden values are of assets/tiny/recogniser/README.md; the bounds are what makes a listener worth having."""
    folders = [str(TINY / name) for name in ("recogniser", "speaker_encoder", "mimi")]
    score_listeners(HELD_OUT, *folders, output_file=tmp_path / "listeners.json")
    rows = json.loads((tmp_path / "listeners.json").read_text())["rows"]
    assert rows["original"]["word_error_rate"] < 0.3 and rows["original"]["equal_error_rate"] < 0.2
    assert rows["8 levels"]["word_error_rate"] < rows["1 level"]["word_error_rate"]
    readme = (TINY / "recogniser" / "README.md").read_text()
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert all(line in readme for line in printed)
