"""The offline codec, how it is trained, and how it is judged."""

import copy
import json

import pyarrow.parquet as pq
import pytest
import torch
import train_tiny_codec
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from score_codec import perplexities
from speech_classifier import LabelledClip, SpeechClassifier, isolated_words
from tiny_codec import (
    DEPTHS,
    MelMagnitude,
    codebooks,
    fit_codebooks,
    new_codec,
    quantize,
    reconstruct,
    standardize,
    tiny_mimi_config,
    write_feature_extractor,
)
from torch import nn
from transformers import AutoFeatureExtractor, MimiConfig, MimiModel

from llama_mimi.audio.mimi import MimiCodec
from llama_mimi.audio.reading import read_audio
from llama_mimi.common.errors import UserError

FRAME = 1920  # samples


def held_out_clips(count, corpus="corpus/validation-00000-of-00001.parquet"):
    rows = pq.read_table(TINY / corpus).slice(0, count).to_pylist()
    return [LabelledClip(read_audio(r["audio"]["bytes"], 24_000).samples_S, r["speaker"], r["text"]) for r in rows]


@pytest.fixture(scope="module")
def speech_B1S():
    """Half a second of four held-out clips."""
    return torch.stack([clip.samples_S[: 6 * FRAME] for clip in held_out_clips(4)])[:, None]


@pytest.fixture(scope="module")
def model(speech_B1S):
    """A small codec as a run has it after fitting the codebooks."""
    torch.manual_seed(0)
    model = new_codec(tiny_mimi_config(codebook_size=16))
    standardize(model, speech_B1S)
    fit_codebooks(model, [speech_B1S])
    return model


@pytest.mark.parametrize("depth", [1, 2, 8])
def test_training_decodes_what_transformers_decodes(model, speech_B1S, depth):
    codes = model.encode(speech_B1S, num_quantizers=depth).audio_codes
    expected = model.decode(codes).audio_values
    decoded, _ = reconstruct(copy.deepcopy(model), speech_B1S, torch.full((4,), depth), is_quantized=True)
    torch.testing.assert_close(decoded, expected, atol=1e-5, rtol=1e-4)


def test_clips_of_a_batch_have_their_own_depth(model, speech_B1S):
    mixed, _ = reconstruct(copy.deepcopy(model), speech_B1S, torch.tensor([1, 3, 8, 1]), is_quantized=True)
    for index, depth in enumerate([1, 3, 8, 1]):
        alone, _ = reconstruct(
            copy.deepcopy(model), speech_B1S[index : index + 1], torch.tensor([depth]), is_quantized=True
        )
        torch.testing.assert_close(mixed[index], alone[0], atol=1e-5, rtol=1e-4)


def test_the_gradient_passes_the_codes_straight_through(model, speech_B1S):
    """The encoder learns although codes have no gradient; acoustic levels that are left out teach it nothing."""
    trained = copy.deepcopy(model)
    decoded, _ = reconstruct(trained, speech_B1S, torch.ones(4, dtype=torch.long), is_quantized=True)
    decoded.square().sum().backward()
    semantic = trained.quantizer.semantic_residual_vector_quantizer.input_proj.weight.grad
    acoustic = trained.quantizer.acoustic_residual_vector_quantizer.input_proj.weight.grad
    assert semantic.abs().sum() > 0
    assert acoustic is None or acoustic.abs().sum() == 0


def test_codebooks_follow_what_they_code_and_none_stays_dead(model):
    branch = copy.deepcopy(model.quantizer.acoustic_residual_vector_quantizer)
    torch.manual_seed(0)
    vectors_BTE = torch.randn(8, 12, 32)
    for layer in branch.layers:
        layer.codebook.embed_sum[8:] = 1e4 * layer.codebook.cluster_usage[8:, None]  # nobody's nearest
        layer.codebook._embed = None
    every_level_B = torch.full((8,), 7)
    _, before = quantize(branch, vectors_BTE, every_level_B)
    for _ in range(300):
        _, after = quantize(branch, vectors_BTE, every_level_B)
    assert after < before / 2
    assert all(layer.codebook.embed.abs().max() < 10 for layer in branch.layers)


def test_k_means_quantizes_better_than_random_codebooks(speech_B1S):
    torch.manual_seed(0)
    model = new_codec(tiny_mimi_config(codebook_size=16))
    standardize(model, speech_B1S)
    everything = torch.full((4,), 8)
    _, random = reconstruct(copy.deepcopy(model), speech_B1S, everything, is_quantized=True)
    fit_codebooks(model, [speech_B1S])
    _, fitted = reconstruct(model, speech_B1S, everything, is_quantized=True)
    assert fitted < random / 2


def test_a_new_codec_starts_with_outputs_of_unit_variance(speech_B1S):
    torch.manual_seed(0)
    model = new_codec(tiny_mimi_config(codebook_size=16))
    deviations = {}

    def record(name):
        return lambda _module, _inputs, output: deviations.__setitem__(name, output.std(dim=(0, 2)))

    standardize(model, speech_B1S)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
            module.register_forward_hook(record(name))
    decoded, _ = reconstruct(model, speech_B1S, torch.full((4,), 8), is_quantized=False)
    deviations.popitem()  # the last one gives samples
    for name, deviation_C in deviations.items():
        torch.testing.assert_close(deviation_C, torch.ones_like(deviation_C), atol=1e-2, rtol=0, msg=name)
    torch.testing.assert_close(decoded.std(), speech_B1S.std(), atol=1e-3, rtol=1e-2)


def flags(folder, **changes):
    corpus = {"corpus": str(TINY / "words/train-*.parquet"), "validation_corpus": str(TINY / "words/val*.parquet")}
    numbers = {"steps": 6, "batch_size": 2, "codebook_size": 16, "learning_rate": 1e-3, "seed": 3}
    return train_tiny_codec.CodecFlags(**corpus | numbers | {"output_dir": folder} | changes)


@pytest.mark.slow
def test_a_stopped_run_continues_exactly(tmp_path, monkeypatch):
    monkeypatch.setattr(train_tiny_codec, "FIT_BATCHES", 2)
    whole = train_tiny_codec.CodecRun(flags(tmp_path / "whole"))
    whole.start()
    whole.run()  # warms up for two steps, fits, and quantizes for four
    stopped = train_tiny_codec.CodecRun(flags(tmp_path / "stopped"))
    stopped.start()
    for _ in range(4):
        stopped.train_step()
    stopped.save()
    again = train_tiny_codec.CodecRun(flags(tmp_path / "stopped"))
    again.start()
    assert again.step == 4 and [start["step"] for start in again.starts] == [0, 4]
    again.run()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    assert again.clips_seen == whole.clips_seen
    finished = train_tiny_codec.CodecRun(flags(tmp_path / "stopped"))
    finished.start()
    finished.run()
    assert finished.starts == again.starts  # what trained nothing is not in the record
    assert {path.name for path in (tmp_path / "whole" / "samples" / "step-000006").iterdir()} == {
        f"{depth}_levels.wav" for depth in (1, 2, 4, 8)
    }

    # what is exported is what was trained, up to float16
    exported = MimiModel.from_pretrained(tmp_path / "whole" / "codec")
    assert exported.dtype == torch.float32
    for ours, theirs in zip(codebooks(whole.model), codebooks(exported), strict=True):
        torch.testing.assert_close(theirs.embed, ours.embed, atol=1e-3, rtol=1e-3)
    record = json.loads((tmp_path / "whole" / "codec" / "training.json").read_text())
    assert record["steps"] == 6 and record["corpus"].endswith("train-*.parquet")

    with pytest.raises(UserError, match=r"other settings .*'batch_size': 2"):
        train_tiny_codec.CodecRun(flags(tmp_path / "whole", batch_size=1)).start()


def test_a_rate_that_diverges_is_named(tmp_path):
    run = train_tiny_codec.CodecRun(flags(tmp_path, learning_rate=1e9, steps=100))
    with pytest.raises(UserError, match=r"the gradient of step \d+ is .*--learning_rate below 1e\+09"):
        for _ in range(20):
            run.train_step()


def test_more_codes_than_frames_are_refused(tmp_path):
    with pytest.raises(UserError, match="--codebook_size is 4096"):
        train_tiny_codec.CodecRun(flags(tmp_path, codebook_size=4096))


def test_the_offline_codec_reconstructs_speech_the_better_the_deeper():
    codec = MimiCodec(str(TINY / "mimi"), 8)
    mel = MelMagnitude(24_000)
    distances = dict.fromkeys(DEPTHS, 0.0)
    for clip in held_out_clips(8):
        (codes_TQ,) = codec.encode([clip.samples_S])
        for depth in distances:
            decoded_S = codec.decode(codes_TQ[:, :depth])[: len(clip.samples_S)]
            distances[depth] += float(mel.distances(decoded_S, clip.samples_S)[0]) / 8
    assert distances[1] > distances[2] > distances[4] > distances[8]
    assert distances[8] < 0.45  # 0.39 over all held-out clips; an untrained codec has 1.8


def test_the_offline_codec_has_the_feature_extractor_of_its_script(tmp_path):
    write_feature_extractor(MimiConfig.from_pretrained(TINY / "mimi"), tmp_path)
    (written,) = tmp_path.iterdir()
    assert written.read_bytes() == (TINY / "mimi" / written.name).read_bytes()
    features = AutoFeatureExtractor.from_pretrained(TINY / "mimi")
    assert (features.sampling_rate, features.feature_size) == (24_000, 1)


def test_the_offline_codec_has_few_megabytes():
    assert sum(path.stat().st_size for path in (TINY / "mimi").iterdir()) < 8e6
    assert MimiModel.from_pretrained(TINY / "mimi").dtype == torch.float32


def test_perplexity_counts_evenly_used_codes():
    codes_TQ = torch.stack([torch.arange(64) % 8, torch.zeros(64, dtype=torch.long)], dim=1)
    assert perplexities(codes_TQ, 16) == pytest.approx([8.0, 1.0])


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(2000, 9000), min_size=2, max_size=6), gap=st.integers(800, 4000))
def test_words_are_cut_out_at_digital_silence(lengths, gap):
    parts = [0.1 + torch.rand(length) for length in lengths]
    joined = torch.cat([torch.cat([part, torch.zeros(gap)]) for part in parts])
    text = " ".join(f"word{index}" for index in range(len(parts)))
    words, uncut = isolated_words([LabelledClip(joined, "a", text)], 24_000)
    assert uncut == 0 and [word.text for word in words] == text.split()
    assert all(torch.equal(word.samples_S, part) for word, part in zip(words, parts, strict=True))
    assert isolated_words([LabelledClip(joined, "a", text + " more")], 24_000) == ([], 1)
    assert isolated_words([LabelledClip(torch.zeros(9000), "a", text)], 24_000) == ([], 1)


def test_the_classifier_knows_speakers_and_words_of_the_offline_corpus():
    train, held_out = (
        held_out_clips(None, "words/train-00000-of-00001.parquet"),
        held_out_clips(None, "words/validation-00000-of-00001.parquet"),
    )
    for kind, num_parts, least in (("speaker", 1, 0.8), ("text", 5, 0.9)):
        classifier = SpeechClassifier(train, [getattr(c, kind) for c in train], 24_000, num_parts=num_parts)
        names = classifier.names([clip.samples_S for clip in held_out])
        right = sum(name == getattr(clip, kind) for name, clip in zip(names, held_out, strict=True))
        assert right / len(held_out) > least, kind
    with pytest.raises(UserError, match="needs at least two"):
        SpeechClassifier(train[:1], ["one"], 24_000)
