"""The offline codec and its training."""

import copy
import json

import pyarrow.parquet as pq
import pytest
import torch
import train_tiny_codec
from conftest import TINY
from tiny_codec import (
    DEPTHS,
    MelMagnitude,
    codebooks,
    fit_codebooks,
    new_codec,
    reconstruct,
    standardize,
    tiny_mimi_config,
    write_feature_extractor,
)
from transformers import AutoFeatureExtractor, MimiConfig, MimiModel

from llama_mimi.audio.mimi import MimiCodec
from llama_mimi.audio.reading import read_audio
from llama_mimi.common.errors import UserError

FRAME = 1920  # samples


def held_out_clips(count):
    rows = pq.read_table(TINY / "corpus/validation-00000-of-00001.parquet").slice(0, count).to_pylist()
    return [read_audio(row["audio"]["bytes"], 24_000).samples_S for row in rows]


@pytest.fixture(scope="module")
def speech_B1S():
    """The first 0.48 s of four held-out clips."""
    return torch.stack([samples_S[: 6 * FRAME] for samples_S in held_out_clips(4)])[:, None]


@pytest.fixture(scope="module")
def model(speech_B1S):
    """A small codec with fitted codebooks."""
    torch.manual_seed(0)
    model = new_codec(tiny_mimi_config(codebook_size=16))
    standardize(model, speech_B1S)
    fit_codebooks(model, [speech_B1S])
    return model


def test_training_decodes_as_transformers_does(model, speech_B1S):
    """Each clip of a batch has its own depth."""
    depths = [1, 3, 8, 1]
    mixed, _ = reconstruct(copy.deepcopy(model), speech_B1S, torch.tensor(depths), is_quantized=True)
    for index, depth in enumerate(depths):
        codes = model.encode(speech_B1S[index : index + 1], num_quantizers=depth).audio_codes
        torch.testing.assert_close(mixed[index], model.decode(codes).audio_values[0], atol=1e-5, rtol=1e-4)


def run(folder, **changes):
    corpus = {"corpus": str(TINY / "words/train-*.parquet"), "validation_corpus": str(TINY / "words/val*.parquet")}
    numbers = {"steps": 6, "batch_size": 2, "codebook_size": 16, "learning_rate": 1e-3, "seed": 3}
    flags = train_tiny_codec.CodecFlags(**corpus | numbers | {"output_dir": folder} | changes)
    return train_tiny_codec.CodecRun(flags)


@pytest.mark.slow
def test_a_stopped_run_continues_exactly(tmp_path, monkeypatch):
    monkeypatch.setattr(train_tiny_codec, "FIT_BATCHES", 2)
    whole = run(tmp_path / "whole")
    whole.run()  # two steps of warm-up, then k-means, then four steps with quantization
    stopped = run(tmp_path / "stopped")
    for _ in range(4):
        stopped.train_step()
    stopped.save()
    again = run(tmp_path / "stopped")
    assert again.step == 4
    again.run()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name

    # the exported codec equals the trained codec, rounded to float16
    exported = MimiModel.from_pretrained(tmp_path / "whole" / "codec")
    assert exported.dtype == torch.float32
    for ours, theirs in zip(codebooks(whole.model), codebooks(exported), strict=True):
        torch.testing.assert_close(theirs.embed, ours.embed, atol=1e-3, rtol=1e-3)
    record = json.loads((tmp_path / "whole" / "codec" / "training.json").read_text())
    assert record["steps"] == 6 and record["corpus"].endswith("train-*.parquet")
    with pytest.raises(UserError, match=r"other settings .*'batch_size': 2"):
        run(tmp_path / "whole", batch_size=1)


def test_a_diverging_codec_run_ends(tmp_path):
    diverging = run(tmp_path, learning_rate=1e9, steps=100)
    with pytest.raises(UserError, match=r"the gradient norm of step \d+ is .*--learning_rate below 1e\+09"):
        for _ in range(20):
            diverging.train_step()


def test_the_offline_codec_reconstructs_speech_the_better_the_deeper():
    codec = MimiCodec(str(TINY / "mimi"), 8)
    mel = MelMagnitude(24_000)
    distances = dict.fromkeys(DEPTHS, 0.0)
    for samples_S in held_out_clips(8):
        (codes_TQ,) = codec.encode([samples_S])
        for depth in distances:
            decoded_S = codec.decode(codes_TQ[:, :depth])[: len(samples_S)]
            distances[depth] += float(mel.distances(decoded_S, samples_S)[0]) / 8
    assert distances[1] > distances[2] > distances[4] > distances[8]
    assert distances[8] < 0.45  # the mean over all held-out clips is 0.39; an untrained codec has 1.8
    assert sum(path.stat().st_size for path in (TINY / "mimi").iterdir()) < 8e6


def test_the_offline_codec_has_the_feature_extractor_of_its_script(tmp_path):
    write_feature_extractor(MimiConfig.from_pretrained(TINY / "mimi"), tmp_path)
    (written,) = tmp_path.iterdir()
    assert written.read_bytes() == (TINY / "mimi" / written.name).read_bytes()
    features = AutoFeatureExtractor.from_pretrained(TINY / "mimi")
    assert (features.sampling_rate, features.feature_size) == (24_000, 1)
