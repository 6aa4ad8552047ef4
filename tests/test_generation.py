"""The decoding loop: whole frames, greedy decoding as in `transformers`, the window, and sampling."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, run_here
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from transformers import CsmForConditionalGeneration, LlamaForCausalLM

from llama_mimi.checkpoint.csm import csm_config
from llama_mimi.checkpoint.huggingface import hf_config
from llama_mimi.common.errors import UserError
from llama_mimi.generation import kv_cache
from llama_mimi.generation.continuation import continue_codes, decode_with_bar, finished, for_model
from llama_mimi.generation.decoding import FinishReason, Request, Sampling, decode, draw_entries
from llama_mimi.generation.flattened import FlattenedModel
from llama_mimi.generation.hierarchical import CsmWithTextHead, HierarchicalModel
from llama_mimi.generation.options import SamplingOptions
from llama_mimi.model.llama import FLAVORS
from llama_mimi.tokens.tokenizer import load_speech_tokenizer

K = 256
WORKER = ThreadPoolExecutor(1)  # without a GPU, PyTorch 2.11 can compile in only one thread besides the main thread
GREEDY = Sampling(max_frames=12, min_frames=0, window_frames=100, temperature=0, top_k=30, top_p=1.0)


def flattened(codec, Q, vocabulary="llama", **shape):
    tokenizer = load_speech_tokenizer(str(TINY / "llama"), str(TINY / "mimi"), Q, vocabulary)
    decoder = LlamaForCausalLM(hf_config(replace(FLAVORS["tiny"], vocab_size=tokenizer.vocabulary.size, **shape)))
    return FlattenedModel(decoder.eval(), tokenizer, codec.at_depth(Q))


def hierarchical(codec, Q, text_head=None, **shape):
    tokenizer = load_speech_tokenizer(str(TINY / "llama"), str(TINY / "mimi"), Q, "llama", "hierarchical")
    shape |= {"architecture": "hierarchical", "num_quantizers": Q, "codebook_size": K}
    shape |= {"enable_weight_tying": text_head == "tied", "predicts_text": text_head is not None}
    args = replace(FLAVORS["tiny"], vocab_size=tokenizer.vocabulary.size, **shape)
    cls = CsmWithTextHead if text_head == "separate" else CsmForConditionalGeneration
    csm = cls(csm_config(args, codec=str(TINY / "mimi"), num_quantizers=Q))
    return HierarchicalModel(csm.eval(), tokenizer, codec.at_depth(Q))


ARCHITECTURES = {"flattened": flattened, "hierarchical": hierarchical}


def built(codec, architecture, Q=4, **shape):
    """Return a random model; without constraints, its samples would be malformed."""
    torch.manual_seed(Q)
    model = ARCHITECTURES[architecture](codec, Q, **shape)
    with torch.no_grad():
        for name, parameter in model.decoder.named_parameters():
            if not name.startswith("codec_model"):
                parameter.mul_(3)
    return model


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(codec, request):
    return built(codec, request.param)


def clip(num_frames, Q=4, seed=0):
    return torch.randint(K, (num_frames, Q), generator=torch.Generator().manual_seed(seed))


PROMPT = clip(6)


def stock_logits(model, codes_TQ, frame):
    """Return logits from `transformers`, without a cache, for the next entry of a frame: codes, then the end."""
    decoder, head, level = model.decoder, model.tokenizer.prefix_ids(), len(frame)
    if model.tokenizer.architecture == "flattened":
        vocabulary = model.tokenizer.vocabulary
        tokens = [vocabulary.base + code * codes_TQ.shape[1] + q for q, code in enumerate(frame)]
        ids_L = [*head, *vocabulary.ids_from_codes(codes_TQ).tolist(), *tokens]
        logits_V = decoder(torch.tensor([ids_L])).logits[0, -1]
        end = [vocabulary.audio_end_id] if level == 0 else []
        return logits_V[[*range(vocabulary.base + level, vocabulary.audio_start_id, codes_TQ.shape[1]), *end]]
    codes_LD = decoder.backbone_model.embed_tokens(codes_TQ[None])[0]
    inputs_LD = torch.cat([decoder.embed_text_tokens(torch.tensor(head)), codes_LD])
    state_1D = decoder.backbone_model(inputs_embeds=inputs_LD[None]).last_hidden_state[:, -1]
    if level == 0:
        return decoder.lm_head(state_1D)[0, : K + 1]
    return decoder.depth_decoder(torch.tensor([[0, *frame]]), state_1D).logits[0, -1, :K]


@torch.no_grad()
def stock_greedy(model, prompt_TQ, max_frames):
    codes_TQ = prompt_TQ
    for _ in range(max_frames):
        frame = []
        while len(frame) < codes_TQ.shape[1]:
            frame.append(int(stock_logits(model, codes_TQ, frame).argmax()))
            if frame[0] == K:
                return codes_TQ
        codes_TQ = torch.cat([codes_TQ, torch.tensor([frame])])
    return codes_TQ


def all_samples(model, requests, sampling, num_rows):
    drawn = finished(decode(model, requests, sampling, num_rows), model.codec.num_quantizers)
    return {number: (new_TQ, end) for number, new_TQ, end, _ in drawn}


class Ending:
    """A model that adds a number of nats to the logit of the end."""

    def __init__(self, model, added):
        self.model, self.added = model, added
        self.spare_caches = {}

    def __getattr__(self, name):
        return getattr(self.model, name)

    def next_frame(self, caches, draw):
        def draw_with_end(logits_BV, level):
            if level == 0:
                logits_BV = torch.cat([logits_BV[:, :-1], logits_BV[:, -1:] + self.added], dim=1)
            return draw(logits_BV, level)

        return self.model.next_frame(caches, draw_with_end)


CASES = [("flattened", 1), ("flattened", 4), ("flattened", 8), ("hierarchical", 2), ("hierarchical", 8)]


@pytest.mark.parametrize(("architecture", "Q"), CASES)
def test_greedy_is_that_of_stock_transformers(codec, architecture, Q):
    """Compare single prompts with a batch: prompts of different lengths, and fewer rows than prompts."""
    model = built(codec, architecture, Q)
    prompts = [clip(length, Q, seed=length) for length in (1, 9, 4, 17, 2)]
    found = all_samples(model, [Request(prompt_TQ, seed=0) for prompt_TQ in prompts], GREEDY, num_rows=3)
    lengths = []
    for number, prompt_TQ in enumerate(prompts):
        wanted_TQ = stock_greedy(model, prompt_TQ, GREEDY.max_frames)
        new_TQ, end = found[number]
        assert torch.equal(torch.cat([prompt_TQ, new_TQ]), wanted_TQ)
        assert end == (FinishReason.LENGTH if len(new_TQ) == GREEDY.max_frames else FinishReason.EOS)
        lengths.append(len(new_TQ))
    assert sum(lengths) > 20, "the comparison has frames"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_step_of_a_gpu_draws_the_same(codec, architecture, monkeypatch):
    """Run the compiled step of a GPU on the CPU, without CUDA graphs, in a worker thread as in the demo.

    Each batch size and each number of visible positions is compiled once, for all layers.
    """

    def addresses(cache):
        tensors = cache.hidden_BD, cache._inputs_BD, cache._lengths_B, cache._growth_B, *cache._keys, *cache._values
        return [tensor.data_ptr() for tensor in tensors]

    def record(function, device):
        recorded.append(function.args[0])
        caches.append((cache := function.func.__self__, addresses(cache)))
        function()  # as before a recording
        return function

    model, requests = built(codec, architecture), [Request(clip(n), 0) for n in (3, 8, 5)]
    wanted = all_samples(model, requests, GREEDY, num_rows=3)
    recorded, caches, compilations = [], [], CompileCounter()
    monkeypatch.setattr(kv_cache, "GRAPH_DEVICES", ("cpu",))
    monkeypatch.setattr(kv_cache, "SHORTEST_GRAPH", 16)
    monkeypatch.setattr(kv_cache, "record_graph", record)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=compilations))
    torch._dynamo.reset()
    for num_rows in (2, 3, 2):
        model.spare_caches.clear()
        found = WORKER.submit(all_samples, model, requests, GREEDY, num_rows).result()
        assert all(torch.equal(found[number][0], wanted[number][0]) for number in range(3))
    depth = [4] * (architecture == "hierarchical")
    sizes = [*depth, 16, 32, 64, 128, 256]
    assert recorded == 3 * sizes and compilations.frame_count == 2 * len(sizes)
    assert all(addresses(cache) == before for cache, before in caches), "a graph reads and writes the same memory"


def test_int8_weights_change_the_probabilities_little(codec):
    model = built(codec, "flattened")
    model.decoder.bfloat16()
    first, others_LBD = torch.randn(9, 192).bfloat16(), torch.randn(9, 2, 192).bfloat16()
    log_probs = []
    with torch.inference_mode():
        for _ in range(2):
            (cache,) = model.caches(2, 18)
            cache.prefill({0: first[:4], 1: first})
            for inputs_BD in others_LBD:
                cache.step(inputs_BD)
            log_probs.append(F.linear(cache.hidden_BD, model.output_rows[0]).float().log_softmax(dim=-1))
            kv_cache.quantize_layers(model.backbone)  # for the second run
    divergence = F.kl_div(log_probs[1], log_probs[0], log_target=True, reduction="batchmean")
    assert 0 < divergence < 0.01, "in nats"


@torch.no_grad()
def test_contexts_of_similar_length_are_prefilled_at_once(codec):
    """On a CPU, padding costs time."""
    model, shapes = flattened(codec, 4, n_layers=1), []
    (cache,) = model.caches(5, 32)
    model.backbone.register_forward_pre_hook(
        lambda module, args, inputs: shapes.append(tuple(inputs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    width = model.backbone.config.hidden_size
    cache.prefill({row: torch.zeros(length, width) for row, length in enumerate((22, 10, 20, 11, 30))})
    assert shapes == [(2, 11), (2, 22), (1, 30)]


def test_caches_of_the_same_size_are_used_again(model):
    """A new cache would need a new graph on a GPU. While a cache is in use, another call gets its own cache."""
    requests = [Request(clip(3, seed=seed), seed) for seed in range(3)]
    first, _ = zip(*all_samples(model, requests, GREEDY, num_rows=2).values(), strict=True)
    (kept,) = model.spare_caches.values()
    in_use = finished(decode(model, requests, GREEDY, 2), 4)
    started = next(in_use)
    assert not model.spare_caches
    again, _ = zip(*all_samples(model, requests, GREEDY, num_rows=2).values(), strict=True)
    late = [new_TQ for _, new_TQ, *_ in (started, *in_use)]
    assert list(model.spare_caches.values()) == [kept] and all(map(torch.equal, first + first, (*again, *late)))


def test_a_sample_depends_on_prompt_and_seed_alone(model):
    """Compare a sample alone with the same sample among ten, which share three rows."""
    options, model = SamplingOptions(seconds=1.2, temperature=1.0), Ending(model, 2.0)
    requests = [Request(clip(2 + number % 5, seed=number), seed=number) for number in range(10)]
    together = all_samples(model, requests, for_model(options, model), num_rows=3)
    assert sorted(together) == list(range(10)) and len({len(new_TQ) for new_TQ, _ in together.values()}) > 2
    for number, request in enumerate(requests):
        (alone_TQ,) = continue_codes(model, request.prompt_TQ, replace(options, seed=number))
        assert torch.equal(alone_TQ, torch.cat([request.prompt_TQ, together[number][0]]))
        assert alone_TQ.min() >= 0 and alone_TQ.max() < K
    one_TQ, two_TQ = continue_codes(model, PROMPT, replace(options, num_samples=2))
    assert torch.equal(two_TQ, continue_codes(model, PROMPT, replace(options, seed=1))[0])
    assert not torch.equal(one_TQ, two_TQ)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 12), st.integers(1, 12), st.floats(0.05, 1.0), st.floats(0.3, 3.0), st.integers(0, 2**30))
def test_sampling_is_that_of_a_plain_loop(num_entries, top_k, top_p, temperature, seed):
    """Draw from the fewest of the ``top_k`` most likely entries whose total probability is at least ``top_p``."""
    generator = torch.Generator().manual_seed(seed)
    logits_V = torch.randn(num_entries, generator=generator) * 2
    order = logits_V.argsort(descending=True).tolist()[:top_k]
    weights = np.exp(logits_V[order].double().numpy() / temperature)
    shares, kept, total = weights / weights.sum(), [], 0.0
    for entry, share in zip(order, shares, strict=True):
        if total >= top_p - 1e-6:
            break
        kept.append((entry, share))
        total += share
    wanted = np.zeros(num_entries)
    wanted[[entry for entry, _ in kept]] = np.array([share for _, share in kept]) / total
    n = 4000  # evenly spaced numbers, so that frequencies are exact to 1 / n
    sampling = Sampling(1, 0, 10, temperature, top_k, top_p)
    drawn_N = draw_entries(logits_V.expand(n, -1), sampling, (torch.arange(n) + 0.5) / n)
    found = torch.bincount(drawn_N, minlength=num_entries).numpy() / n
    assert np.abs(found - wanted).max() <= 2 / n


def test_a_model_that_overflows_says_so(codec):
    model = built(codec, "flattened", n_layers=1)
    with torch.no_grad():
        model.backbone.norm.weight.fill_(torch.inf)
    with pytest.raises(UserError, match="overflows in float32; set --dtype float32, or use another checkpoint"):
        continue_codes(model, PROMPT, SamplingOptions())


def test_speech_does_not_end_before_min_seconds(model):
    ends_at_once = Ending(model, 1e4)
    for min_seconds, seconds, num_frames in ((0.0, 2.0, 0), (0.08, 2.0, 1), (0.6, 2.0, 8), (1.0, 1.0, 13)):
        (codes_TQ,) = continue_codes(ends_at_once, PROMPT, SamplingOptions(seconds=seconds, min_seconds=min_seconds))
        assert len(codes_TQ) == 6 + num_frames
    # Rows that start at different times.
    eager, sampling = Ending(model, 7.0), replace(GREEDY, temperature=1.0, min_frames=3)
    rows = all_samples(eager, [Request(clip(2 + seed), seed) for seed in range(9)], sampling, num_rows=2)
    lengths = {len(new_TQ) for new_TQ, _ in rows.values()}
    assert min(lengths) == 3 and len(lengths) > 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_seconds": float("nan")}, "--min_seconds is nan; choose a value from 0 to 1e\\+09"),
        ({"min_seconds": 10.1}, "--min_seconds is 10.1, but --seconds is 10"),
        ({"top_p": 1.5}, "--top_p is 1.5; choose a value from 1e-09 to 1"),
        ({"window_seconds": 20_000.0, "seconds": 20_000.0}, "positions, more than the model's context of 131,072"),
    ],
)
def test_options_out_of_range_are_refused(model, options, message):
    with pytest.raises(UserError, match=message):
        continue_codes(model, PROMPT, SamplingOptions(**options))


def test_progress_shows_the_seconds_of_new_audio(model, capsys, monkeypatch):
    """A sample that ends before its maximum length lowers the total."""

    def drawn(*arguments):
        yield 0, PROMPT[0]
        time.sleep(1.1)
        yield 0, FinishReason.EOS
        yield from ((1, frame_Q) for frame_Q in clip(10))
        yield 1, FinishReason.LENGTH

    monkeypatch.setattr("llama_mimi.generation.continuation.decode", drawn)
    requests = [Request(PROMPT, seed) for seed in range(2)]
    assert len(list(decode_with_bar(model, requests, SamplingOptions(seconds=0.8), 2))) == 13
    assert "new audio: 0.9 of 0.9 s [00:01, left: 00:00]" in capsys.readouterr().err


@pytest.mark.parametrize("num_frames", [6, 40])  # a prompt within the window, and a longer one
def test_past_the_window_the_start_of_the_prompt_and_the_last_frames_are_read(model, num_frames):
    """Each new context equals the context of a new prompt with the same frames, and is not longer than the window."""
    window, max_frames, prompt_TQ = 16, 60, clip(num_frames)
    sampling = replace(GREEDY, window_frames=window, max_frames=max_frames, min_frames=max_frames)
    ((new_TQ, end),) = all_samples(model, [Request(prompt_TQ, 0)], sampling, num_rows=1).values()
    assert len(new_TQ) == max_frames and end is FinishReason.LENGTH
    codes_TQ = context_TQ = prompt_TQ
    while len(codes_TQ) < num_frames + max_frames:
        if len(context_TQ) >= window:
            context_TQ = torch.cat([prompt_TQ[: window // 4], codes_TQ[-(window // 2) :]])
        num_new = min(window - len(context_TQ), num_frames + max_frames - len(codes_TQ))
        step = replace(GREEDY, window_frames=100, max_frames=num_new, min_frames=num_new)
        ((part_TQ, _),) = all_samples(model, [Request(context_TQ, 0)], step, num_rows=1).values()
        codes_TQ, context_TQ = torch.cat([codes_TQ, part_TQ]), torch.cat([context_TQ, part_TQ])
    assert torch.equal(torch.cat([prompt_TQ, new_TQ]), codes_TQ)


def test_text_comes_before_the_speech(codec):
    """The order is that of training (task "tts"): BOS, text, <audio>. A spoken prompt is optional."""
    model = built(codec, "flattened")
    options = SamplingOptions(seconds=1.0, min_seconds=1.0, temperature=0)
    for prompt_TQ in (torch.zeros(0, 4, dtype=torch.long), PROMPT):
        spoken = [continue_codes(model, prompt_TQ, options, text)[0] for text in ("one two", "three", None)]
        assert not torch.equal(spoken[0], spoken[1]) and not torch.equal(spoken[0], spoken[2])
        ids_L = model.tokenizer.encode(prompt_TQ, is_cut=True, text="one two")
        with torch.no_grad():
            logits_V = model.decoder(ids_L[None]).logits[0, -1]
        vocabulary = model.tokenizer.vocabulary
        first = logits_V[vocabulary.base : vocabulary.audio_start_id : 4].argmax()
        assert spoken[0][len(prompt_TQ), 0] == first
    model.decoder.config.update({"task": "a2a"})
    for without_text in (model, flattened(codec, 4, "audio")):
        with pytest.raises(
            UserError, match="a text to speak needs the task 'tts', but the model was trained on audio; choose"
        ):
            continue_codes(without_text, PROMPT, options, "one")
    code, stderr = run_here("inference.py", "--text", os.fsdecode(b"caf\xe9"))
    assert code == 1 and r"--text 'caf\xe9' is not UTF-8" in stderr
