"""Codec: batches, padding, sliding window, and levels."""

import math

import pytest
import torch
from conftest import TINY

from llama_mimi.audio.mimi import MimiCodec
from llama_mimi.audio.reading import read_audio
from llama_mimi.common.errors import UserError


@pytest.fixture(scope="module")
def speech():
    return read_audio(TINY / "prompt.wav", 24_000).samples_S


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_are_the_same_alone_and_in_a_batch(speech, dtype):
    codec = MimiCodec(str(TINY / "mimi"), 4, dtype=dtype)
    clips = [speech[: 1920 * frames + rest] for frames, rest in ((12, 0), (3, 0), (25, 0), (1, 0), (7, 100))]
    for samples_S, codes_TQ in zip(clips, codec.encode(clips), strict=True):
        assert torch.equal(codec.encode([samples_S])[0], codes_TQ)
        assert codes_TQ.shape == (math.ceil(len(samples_S) / 1920), 4)


def test_a_partial_frame_is_padded_with_zeros(codec, speech):
    clip = speech[:5000]
    padded = torch.cat([clip, torch.zeros(3 * 1920 - 5000)])
    assert torch.equal(codec.encode([clip])[0], codec.encode([padded])[0])


@pytest.mark.parametrize("batch_seconds", [None, 0.5, 2.0, 100.0])
def test_many_clips_come_back_in_their_order(codec, speech, batch_seconds):
    clips = [speech[: 1920 * frames] for frames in (9, 2, 14, 5, 2, 11)]
    for codes_TQ, clip_S in zip(codec.encode_many(clips, batch_seconds), clips, strict=True):
        assert codes_TQ.equal(codec.encode([clip_S])[0])
    assert codec.encode_many([], batch_seconds) == []


def test_without_its_window_the_codec_attends_to_all_that_came_before(codec, speech):
    """In each layer of the tiny codec, the window has 24 positions at 25 Hz."""
    whole = MimiCodec(codec.name, 4, sliding_window=False)
    (windowed_TQ,), (whole_TQ,) = codec.encode([speech]), whole.encode([speech])
    assert torch.equal(windowed_TQ[:12], whole_TQ[:12]) and not torch.equal(windowed_TQ, whole_TQ)
    # The first frames change later codes only without the window.
    reach = 1 + codec.config.num_hidden_layers * codec.config.sliding_window // 2
    long = torch.cat([speech] * (reach * 1920 // len(speech) + 2))
    other = torch.cat([torch.zeros(4 * 1920), long[4 * 1920 :]])
    ends = [[c.encode([samples_S])[0][reach + 10 :] for samples_S in (long, other)] for c in (codec, whole)]
    assert torch.equal(*ends[0]) and not torch.equal(*ends[1])
    assert (codec.sliding_window, whole.sliding_window) == (True, False)


def test_fewer_levels_are_a_prefix(speech):
    deep = MimiCodec(str(TINY / "mimi"), 8).encode([speech])[0]
    for Q in (1, 4):
        assert torch.equal(MimiCodec(str(TINY / "mimi"), Q).encode([speech])[0], deep[:, :Q])


def test_a_codec_that_does_not_fit_is_refused():
    for num_quantizers in (0, 9):
        with pytest.raises(UserError, match="1 to 8 levels"):
            MimiCodec(str(TINY / "mimi"), num_quantizers)
    for name, message in (("models/no/such", "does not exist"), ("kyutai/mimi", "hf download kyutai/mimi")):
        with pytest.raises(UserError, match=message):
            MimiCodec(name, 4)
