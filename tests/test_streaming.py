"""Chunked decoding gives the same audio as decoding all codes at once."""

from itertools import pairwise

import pytest
import soundfile
import torch
from conftest import TINY, costly
from hypothesis import given
from hypothesis import strategies as st
from transformers import MimiConfig, MimiModel

from llama_mimi.audio import streaming
from llama_mimi.audio.mimi import MimiCodec
from llama_mimi.audio.reading import Waveform
from llama_mimi.audio.silence import silences
from llama_mimi.audio.streaming import DecodingStream, decode_long


def streamed(codec, codes_TQ, chunks):
    stream = DecodingStream(codec)
    return torch.cat([stream.decode(part_TQ) for part_TQ in codes_TQ.split(chunks)])


def test_any_chunks_give_the_audio_of_the_whole(codec, monkeypatch):
    """Real codes, longer than the attention window (12 frames); `codec.decode` is unchanged afterwards."""
    samples = torch.from_numpy(soundfile.read(TINY / "prompt.wav", dtype="float32")[0])
    (codes_TQ,) = codec.encode([samples.repeat(3)[: 40 * codec.frame_size]])
    whole_S = codec.decode(codes_TQ)
    assert len(codes_TQ) == 40 and whole_S.abs().max() > 0.1

    @costly(60)
    @given(st.sets(st.integers(1, 39)))
    def check(bounds):
        chunks = [end - start for start, end in pairwise([0, *sorted(bounds), 40])]
        torch.testing.assert_close(streamed(codec, codes_TQ, chunks), whole_S, atol=1e-5, rtol=0)

    check()
    torch.testing.assert_close(streamed(codec, codes_TQ, [1] * 40), whole_S, atol=1e-5, rtol=0)
    monkeypatch.setattr(streaming, "CHUNK_FRAMES", 16)
    torch.testing.assert_close(decode_long(codec, codes_TQ), whole_S, atol=1e-5, rtol=0)
    torch.testing.assert_close(codec.decode(codes_TQ), whole_S, atol=0, rtol=0)


@pytest.mark.parametrize("window", [True, False])
def test_the_shape_of_mimi_itself(tmp_path, window):
    """Random weights in the shape of kyutai/mimi with 8 levels and a short window."""
    torch.manual_seed(0)
    MimiModel(MimiConfig(sliding_window=10)).save_pretrained(tmp_path)
    codec = MimiCodec(str(tmp_path), 8, sliding_window=window)
    codes_TQ = torch.randint(2048, (14, 8))
    whole_S = codec.decode(codes_TQ)
    for chunks in ([1] * 14, [2, 5, 1, 6]):
        error = (streamed(codec, codes_TQ, chunks) - whole_S).abs().max()
        assert error <= 1e-5 * max(float(whole_S.abs().max()), 1)


def test_memory_of_a_stream_does_not_grow(codec):
    stream, codes_TQ, sizes = DecodingStream(codec), torch.randint(256, (20, 4)), []
    for _ in range(4):
        stream.decode(codes_TQ)
        cached = [tensor for layer in stream._cache.layers for tensor in (layer.keys, layer.values)]
        sizes.append(sum(tensor.numel() for tensor in (*stream._inputs.values(), *cached)))
    assert sizes[1] == sizes[2] == sizes[3]


def test_silences_are_found():
    rate = 1000
    tone = torch.sin(torch.arange(2 * rate) * 0.6)
    clip = torch.cat([tone, torch.zeros(2500), tone, torch.zeros(1000), tone])
    assert silences(Waveform(clip, rate), 2.0) == [(2.0, 2.5)]
    assert silences(Waveform(clip, rate), 1.0) == [(2.0, 2.5), (6.5, 1.0)]
    assert silences(Waveform(torch.zeros(0), rate), 1.0) == []
    assert silences(Waveform(torch.zeros(3000), rate), 2.0) == [(0.0, 3.0)]
