"""No sample is ever malformed, whatever the model prefers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from llama_mimi.checkpoint.huggingface import hf_config
from llama_mimi.common.errors import UserError
from llama_mimi.generation.continuation import SamplingOptions, continue_codes
from llama_mimi.generation.flattened import FlattenedModel, FrameGrammar
from llama_mimi.model.llama import FLAVORS, LlamaMimiArgs
from llama_mimi.tokens.units import UnitVocabulary


@pytest.fixture(scope="module")
def model(codec, sequences):
    """A random decoder, whose unconstrained samples would be malformed at once."""
    torch.manual_seed(0)
    args = LlamaMimiArgs(**{**vars(FLAVORS["tiny"]), "vocab_size": sequences.vocabulary.size})
    decoder = LlamaForCausalLM(hf_config(args)).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(5)
    return FlattenedModel(decoder, sequences, codec)


PROMPT = torch.randint(256, (6, 4), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("temperature", [0.0, 0.8, 5.0])
def test_samples_are_whole_frames_after_the_prompt(model, temperature):
    options = SamplingOptions(seconds=2.0, temperature=temperature, top_k=30, num_samples=3)
    samples = continue_codes(model, PROMPT, options)
    assert len(samples) == 3
    for codes_TQ in samples:
        assert torch.equal(codes_TQ[:6], PROMPT)
        assert codes_TQ.shape[1] == 4 and 6 <= len(codes_TQ) <= 6 + 25
        assert codes_TQ.min() >= 0 and codes_TQ.max() < 256


def test_same_seed_same_samples(model):
    samples = [continue_codes(model, PROMPT, SamplingOptions(seconds=1.0, seed=seed))[0] for seed in (1, 1, 2)]
    assert torch.equal(samples[0], samples[1]) and not (
        samples[0].shape == samples[2].shape and torch.equal(samples[0], samples[2])
    )


def test_speech_ends_between_frames_and_samples_end_apart(model, monkeypatch):
    """A decoder that likes </audio> more and more: samples of different lengths, all of whole frames."""
    end_id = model.sequences.vocabulary.audio_end_id
    forward = model.decoder.forward

    def eager_to_end(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits[..., end_id] = output.logits[..., : end_id - 1].max(dim=-1).values - 1
        return output

    monkeypatch.setattr(model.decoder, "forward", eager_to_end)
    samples = continue_codes(model, PROMPT, SamplingOptions(seconds=8.0, num_samples=8, top_k=5, temperature=2.0))
    lengths = {len(codes_TQ) for codes_TQ in samples}
    assert len(lengths) > 1 and min(lengths) < 6 + 100


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 8), st.integers(2, 20), st.integers(0, 30), st.integers(1, 5), st.integers(0, 6))
def test_grammar(Q, K, num_new_tokens, num_head_tokens, min_frames):
    vocabulary = UnitVocabulary(base=11, codebook_size=K, num_quantizers=Q)
    ids = torch.zeros(1, num_head_tokens + num_new_tokens, dtype=torch.long)
    scores = FrameGrammar(vocabulary, num_head_tokens, min_frames)(ids, torch.zeros(1, vocabulary.size))
    frame, level = divmod(num_new_tokens, Q)
    allowed = {vocabulary.base + code * Q + level for code in range(K)} | (
        {vocabulary.audio_end_id} if level == 0 and frame >= min_frames else set()
    )
    assert set(torch.isfinite(scores[0]).nonzero().flatten().tolist()) == allowed


def test_speech_does_not_end_before_min_seconds(model, monkeypatch):
    end_id, forward = model.sequences.vocabulary.audio_end_id, model.decoder.forward

    def ends_at_once(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits[..., end_id] = output.logits.max() + 100
        return output

    monkeypatch.setattr(model.decoder, "forward", ends_at_once)
    for min_seconds, num_frames in ((0.0, 0), (0.08, 1), (0.56, 7), (0.6, 8), (2.0, 25)):
        (codes_TQ,) = continue_codes(model, PROMPT, SamplingOptions(seconds=2.0, min_seconds=min_seconds))
        assert len(codes_TQ) == 6 + num_frames
    (codes_TQ,) = continue_codes(model, PROMPT, SamplingOptions(seconds=1.0, min_seconds=1.0))
    assert len(codes_TQ) == 6 + 13  # 12.5 are not enough
    for min_seconds in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="--min_seconds is .* out of range"):
            SamplingOptions(seconds=2.0, min_seconds=min_seconds)
    with pytest.raises(UserError, match="--min_seconds is 2.1, more than --seconds 2"):
        SamplingOptions(seconds=2.0, min_seconds=2.1)


def test_too_long_for_the_context_is_refused(model):
    with pytest.raises(UserError, match="more than the model's context of 131,072"):
        continue_codes(model, PROMPT, SamplingOptions(seconds=3000.0))
