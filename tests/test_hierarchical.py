"""Logits, losses, scores and generation of the hierarchical architecture equal `CsmForConditionalGeneration`."""

import itertools
import json
import logging
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from conftest import TINY
from transformers import AutoTokenizer, CsmForConditionalGeneration, MimiModel

from llama_mimi.audio.mimi import MimiCodec
from llama_mimi.checkpoint.architectures import save_run_record, speech_config
from llama_mimi.checkpoint.conversion import convert_checkpoint
from llama_mimi.checkpoint.csm import csm_config, csm_state
from llama_mimi.common.errors import UserError
from llama_mimi.corpora.code_shards import CodedClip
from llama_mimi.data.dataloader import SpeechDataLoader
from llama_mimi.data.examples import ExampleBuilder
from llama_mimi.data.order import ShuffledOrder, Stream
from llama_mimi.data.packing import BatchPacker
from llama_mimi.evaluation.options import Scoring
from llama_mimi.evaluation.scoring import batch_scores
from llama_mimi.generation.continuation import continue_codes
from llama_mimi.generation.hierarchical import HierarchicalModel
from llama_mimi.generation.loading import load_speech_model
from llama_mimi.generation.options import SamplingOptions
from llama_mimi.model.architectures import build_model
from llama_mimi.model.hierarchical import FRAME_MULTIPLES, FrameAttention, frame_attention
from llama_mimi.model.llama import FLAVORS
from llama_mimi.tokens.tokenizer import IGNORE_INDEX, load_speech_tokenizer
from llama_mimi.training.loss import LevelMeter, SpeechLoss, level_weights

Q, K = 4, 256


@pytest.fixture(scope="module")
def tokenizer():
    return load_speech_tokenizer(str(TINY / "llama"), str(TINY / "mimi"), Q, "llama", "hierarchical")


def built(architecture, seed=0, **settings):
    """Return a small model with random weights, and its tokenizer."""
    tokenizer = load_speech_tokenizer(str(TINY / "llama"), str(TINY / "mimi"), Q, "llama", architecture)
    own = {"architecture": architecture, "enable_weight_tying": architecture == "flattened", "max_seq_len": 256}
    own |= {"vocab_size": tokenizer.vocabulary.size, "num_quantizers": Q, "codebook_size": K}
    torch.manual_seed(seed)
    model = build_model(replace(FLAVORS["tiny"], **own | settings))
    with torch.no_grad():
        model.init_weights()
        if architecture == "hierarchical":
            for head in (model.output_layer, model.depth.heads):  # makes the distributions less uniform
                head.weight.mul_(4)
    return model, tokenizer


def in_transformers(model):
    config = csm_config(model.model_args, codec=str(TINY / "mimi"), num_quantizers=Q)
    csm = CsmForConditionalGeneration(config).eval()
    missing, unexpected = csm.load_state_dict(csm_state(model.state_dict(), model.model_args), strict=False)
    assert set(unexpected) <= {"text_head.weight"} and all(name.startswith("codec_model.") for name in missing)
    csm.tie_weights()
    return csm


@pytest.fixture(scope="module")
def pair():
    model, _ = built("hierarchical")
    return model, in_transformers(model)


def clip(num_frames, seed=0):
    return torch.randint(K, (num_frames, Q), generator=torch.Generator().manual_seed(seed))


def batch(tokenizer, clips, seq_len, is_packed=False, depth=None):
    packer = BatchPacker(tokenizer, 1 if is_packed else len(clips), seq_len, is_packed=is_packed, has_positions=True)
    for codes_TQ in clips:
        example = ExampleBuilder(tokenizer).build("audio", CodedClip("clip", codes_TQ.numpy(), 0.0, is_cut=False))
        if depth is not None:
            example.labels_NW[~depth[: len(codes_TQ) + 1], 1:] = IGNORE_INDEX
        assert packer.add(example) == len(codes_TQ)
    return packer.pop()


def run(model, inputs):
    extra = {"targets": inputs["targets"]} if "targets" in inputs else {}
    if model.model_args.attn_type == "varlen":
        extra["attention_masks"] = model.get_attention_masks(inputs["input"], None, inputs)
        extra["positions"] = inputs["positions"]
    return model(inputs["input"], **extra)


def loss_of(
    model, tokenizer, clips, seq_len, weights=(1.0,) * (Q + 1), is_packed=False, depth=None, pad_id=0, chunk_step=None
):
    """Return the loss and the sums by level for a batch, and compute the gradients. Works for both architectures."""
    inputs, labels_BLQ = batch(tokenizer, clips, seq_len, is_packed, depth)
    has_target_BL = labels_BLQ.view(len(labels_BLQ), seq_len, -1)[..., 0] != IGNORE_INDEX
    is_padding_BL = has_target_BL.int().flip(1).cummax(dim=1).values.flip(1) == 0
    inputs["input"][is_padding_BL] = pad_id
    meter = LevelMeter()
    loss = SpeechLoss(tokenizer.vocabulary, meter, weights, chunk_step=chunk_step)(run(model, inputs), labels_BLQ)
    loss = loss / (labels_BLQ != IGNORE_INDEX).sum()
    model.zero_grad()
    loss.backward()
    return loss.detach(), meter.pop()


def csm_inputs(csm, tokenizer, codes_TQ):
    """Return the embeddings (1, L, D) of ``BOS <audio>`` and all frames of a clip, without the end."""
    prefix_1LD = csm.embed_text_tokens(torch.tensor([tokenizer.prefix_ids()]))
    return torch.cat([prefix_1LD, csm.backbone_model.embed_tokens(codes_TQ[None])], dim=1)


@pytest.mark.parametrize("device", ["cpu", "like cuda"])
def test_logits_and_loss_are_those_of_transformers(pair, tokenizer, device, monkeypatch):
    """In CSM, the loss is a sum of two means, and the end is a frame with K at every level."""
    model, csm = pair
    if device != "cpu":
        as_on_gpus(monkeypatch)
    codes_TQ = clip(9)
    frames_TQ = torch.cat([codes_TQ, torch.full((1, Q), K)])
    output = run(model, batch(tokenizer, [codes_TQ], 16)[0])
    labels_1LQ = torch.cat([torch.full((2, Q), IGNORE_INDEX), frames_TQ])[None]
    with torch.no_grad():
        states_TD = csm.backbone_model(inputs_embeds=csm_inputs(csm, tokenizer, codes_TQ)).last_hidden_state[0, 1:]
        level_0_TV = csm.lm_head(states_TD)
        inputs_TQ = F.pad(frames_TQ[:, :-1], (1, 0))
        depth_TqV = csm.depth_decoder(input_ids=inputs_TQ, backbone_last_hidden_state=states_TD).logits
        theirs = csm(inputs_embeds=csm_inputs(csm, tokenizer, frames_TQ), labels=labels_1LQ)
    torch.testing.assert_close(output.level_0.compute()[0, 1:11], level_0_TV, atol=1e-5, rtol=1e-5)
    for level, logits in enumerate(output.levels, start=1):
        torch.testing.assert_close(logits.compute()[0, :10], depth_TqV[:, level - 1], atol=1e-5, rtol=1e-5)
    ours, _ = loss_of(model, tokenizer, [codes_TQ], 32)
    wanted = (theirs.backbone_loss + (Q - 1) * theirs.depth_decoder_loss) / Q
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)


def test_frames_that_do_not_train_the_depth_decoder(pair, tokenizer):
    """If a frame does not train the depth decoder, only its level 0 counts. Losses of other frames do not change."""
    model, _ = pair
    codes_TQ, is_deep_T = clip(8), np.array([True, False, False, True, False, False, False, False, False])
    _, sums = loss_of(model, tokenizer, [codes_TQ], 16, depth=is_deep_T)
    assert sums[1].tolist() == [8, 2, 2, 2, 1, 0]
    inputs, labels_BLQ = batch(tokenizer, [codes_TQ], 16)
    meter = LevelMeter()
    labels_BLQ[0, 1:10][~torch.from_numpy(is_deep_T), 1:] = IGNORE_INDEX
    assert labels_BLQ[0, 9].tolist() == [tokenizer.vocabulary.audio_end_id, *[IGNORE_INDEX] * 3]
    SpeechLoss(tokenizer.vocabulary, meter, [1.0] * (Q + 1))(run(model, inputs | {"targets": labels_BLQ}), labels_BLQ)
    torch.testing.assert_close(meter.pop(), sums)


@pytest.mark.parametrize(("H", "G", "D"), [(3, 1, 32), (4, 4, 16), (8, 2, 64)])
def test_attention_over_levels_is_that_of_pytorch(H, G, D):
    generator = torch.Generator().manual_seed(0)
    results = []
    for attend in (frame_attention, partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)):
        generator.manual_seed(0)
        # As in a block, the heads are transposed.
        parts = [torch.randn(5, Q, heads, D, generator=generator, requires_grad=True) for heads in (H, G, G)]
        output_NHQD = attend(*(x_NQHD.transpose(1, 2) for x_NQHD in parts))
        output_NHQD.backward(torch.randn(5, H, Q, D, generator=generator))
        results.append([output_NHQD, *(x_NQHD.grad for x_NQHD in parts)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def as_on_gpus(monkeypatch):
    """Use the attention of GPUs in the depth decoder, and pad the number of frames to a multiple of 8."""
    monkeypatch.setattr(FrameAttention, "forward", lambda self, q, k, v, enable_gqa: frame_attention(q, k, v))
    monkeypatch.setitem(FRAME_MULTIPLES, "cpu", 8)


@pytest.mark.parametrize("num_deep", [0, 3, 7])
def test_attention_and_padding_of_gpus_change_no_loss_and_no_gradient(pair, tokenizer, num_deep, monkeypatch):
    model, results, shapes = pair[0], [], []
    inputs, labels_1LQ = batch(tokenizer, [clip(9)], 16, depth=np.arange(10) < num_deep)
    labels_1LQ[:, 0] = labels_1LQ[:, 1]  # a target at position 0, from which padding is copied
    hook = model.depth.register_forward_hook(lambda depth, inputs, output: shapes.append(len(inputs[0])))
    for _ in range(2):
        meter = LevelMeter()
        output = run(model, inputs | {"targets": labels_1LQ})
        loss_sum = SpeechLoss(tokenizer.vocabulary, meter, (4.0, 2.0, 1.0, 1.0, 1.0))(output, labels_1LQ)
        loss = loss_sum / (labels_1LQ != IGNORE_INDEX).sum()
        gradients = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
        results.append([loss, meter.pop(), *gradients])
        as_on_gpus(monkeypatch)
    hook.remove()
    assert shapes == [num_deep + 1 if num_deep else 1, 8]
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_gpus_see_few_numbers_of_frames(monkeypatch):
    """20 steps with random frames have at most two shapes."""
    monkeypatch.setitem(FRAME_MULTIPLES, "cpu", FRAME_MULTIPLES["cuda"])
    (model, _), shapes = built("hierarchical", n_layers=0), []
    monkeypatch.setattr(model.depth, "forward", lambda hidden_ND, codes_NqD: shapes.append(len(hidden_ND)))
    generator = torch.Generator().manual_seed(0)
    tokens_BLQ = torch.zeros(4, 1024, Q, dtype=torch.long)
    for _ in range(20):
        targets_BLQ = tokens_BLQ.masked_fill(torch.rand(4, 1024, 1, generator=generator) > 0.25, IGNORE_INDEX)
        with torch.no_grad():
            model(tokens_BLQ, targets=targets_BLQ)
    assert len(shapes) == 20 and set(shapes) == {1024, 1280}


def test_weighted_gradients_are_those_of_the_plain_formula(pair, tokenizer):
    model, _ = pair
    clips, weights = [clip(6, 1), clip(3, 2)], (2.0, 1.0, 0.5, 0.5)
    loss, sums = loss_of(model, tokenizer, clips, 12, weights)
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    inputs, labels_BLQ = batch(tokenizer, clips, 12)
    output, plain = run(model, inputs), 0.0
    entries_BLQ = tokenizer.vocabulary.entries(labels_BLQ).where(labels_BLQ != IGNORE_INDEX, IGNORE_INDEX)
    logits = [output.level_0.compute().flatten(0, 1), *(level.compute()[0] for level in output.levels)]
    for level, (weight, logits_NV) in enumerate(zip(weights, logits, strict=True)):
        entries_N = entries_BLQ.flatten(0, 1)[output.depth_N if level else slice(None), level]
        plain += weight * F.cross_entropy(logits_NV, entries_N, reduction="sum", ignore_index=IGNORE_INDEX)
        log_probs_NV = logits_NV[:, : K + (level == 0)].log_softmax(dim=1)  # the codes, and the end at level 0
        is_code_N = (entries_N >= 0) & (entries_N < K)
        wanted = -log_probs_NV[is_code_N, entries_N[is_code_N]].sum()
        assert sums[2, level].item() == pytest.approx(wanted.item(), rel=1e-5)
    plain = plain / (labels_BLQ != IGNORE_INDEX).sum()
    torch.testing.assert_close(loss, plain.detach(), atol=1e-6, rtol=1e-5)
    for gradient, wanted in zip(gradients, torch.autograd.grad(plain, list(model.parameters())), strict=True):
        torch.testing.assert_close(gradient, wanted, atol=1e-6, rtol=1e-4)
    _, unweighted = loss_of(model, tokenizer, clips, 12)
    torch.testing.assert_close(sums, unweighted)


@pytest.fixture(scope="module")
def speech_model(pair, tokenizer):
    return HierarchicalModel(pair[1], tokenizer, MimiCodec(str(TINY / "mimi"), Q))


@pytest.mark.parametrize("is_cut", [False, True])
@pytest.mark.parametrize(
    "scoring", [Scoring(None), Scoring((0,)), Scoring((1, 3)), Scoring(None, likelihood="grammar")], ids=str
)
@torch.no_grad()
def test_a_score_is_that_of_the_plainest_loop(speech_model, tokenizer, scoring, is_cut):
    """Scores from a batch with a longer clip equal the results of a loop over single frames and levels."""
    csm, codes_TQ = speech_model.decoder, clip(6, 5)
    found, _ = batch_scores(speech_model, [(codes_TQ, is_cut), (clip(11, 6), False)], scoring, [2, 0])
    states_LD = csm.backbone_model(inputs_embeds=csm_inputs(csm, tokenizer, codes_TQ)).last_hidden_state[0]
    num_entries, values = K if scoring.likelihood == "grammar" else K + 1, {}  # the end is valid only at level 0
    for frame, (state_D, entries_Q) in enumerate(zip(states_LD[1:-1], codes_TQ, strict=True)):
        for level in range(Q):
            if level:
                ids_1L = torch.tensor([[0, *entries_Q[:level].tolist()]])
                depth = csm.depth_decoder(input_ids=ids_1L, backbone_last_hidden_state=state_D[None])
                logits_V = depth.logits[0, level - 1, :num_entries]
            else:
                logits_V = csm.lm_head(state_D)
            values[frame, level] = float(logits_V.log_softmax(-1)[entries_Q[level]])
    end = [] if is_cut else [float(csm.lm_head(states_LD[-1]).log_softmax(-1)[K])]

    def mean(levels, first=0):
        some = [value for (frame, level), value in values.items() if frame >= first and level in levels] + end
        return pytest.approx(sum(some) / len(some), abs=1e-5)

    every = range(Q)
    levels = every if scoring.levels is None else scoring.levels
    expected = {"primary": mean(levels), "after_prompt": mean(levels, first=2)}
    expected |= {name: mean(some) for name, some in (("level_0", [0]), ("all_levels", every)) if [*some] != [*levels]}
    assert found == expected


def test_a_checkpoint_becomes_a_stock_folder(tmp_path, monkeypatch, caplog):
    """Unmodified transformers and this project generate the same codes from a converted folder."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model, tokenizer = built("hierarchical", seed=1)
    save_run_record(str(tmp_path / "run"), speech_config(model.model_args, tokenizer, str(TINY / "mimi")), tokenizer)
    dcp.save(model.state_dict(), checkpoint_id=tmp_path / "run" / "checkpoint" / "step-1", no_dist=True)
    convert_checkpoint(tmp_path / "run" / "checkpoint", tmp_path / "folder")
    csm = CsmForConditionalGeneration.from_pretrained(tmp_path / "folder").eval()
    assert not [record for record in caplog.records if "token_id" in record.getMessage()]
    wanted = in_transformers(model).state_dict()
    codec = MimiModel.from_pretrained(TINY / "mimi").state_dict()
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    # The codec has as many levels as the model, because transformers encodes prompts with all levels.
    assert csm.config.codec_config.num_quantizers == Q and not config["tie_word_embeddings"]
    for name, weight in csm.state_dict().items():
        torch.testing.assert_close(weight, codec.get(name.removeprefix("codec_model."), wanted[name]), rtol=0, atol=0)
    text_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "folder")
    ids_1L = text_tokenizer("<audio>", return_tensors="pt").input_ids
    assert ids_1L[0].tolist() == tokenizer.prefix_ids()
    sampling = csm.depth_decoder.generation_config
    assert sampling.do_sample and (sampling.temperature, sampling.top_k) == (0.8, 30), "levels are drawn, too"
    for network in (config, config["depth_decoder_config"]):  # for transformers 4.x
        assert network["rope_theta"] == network["rope_parameters"]["rope_theta"] == 500_000
    assert config["rope_scaling"]["factor"] == 32 and config["depth_decoder_config"]["rope_scaling"] is None
    speech = load_speech_model(str(tmp_path / "folder"), device="cpu")
    reference = HierarchicalModel(in_transformers(model), tokenizer, speech.codec)
    clips = [(clip(6), False), (clip(4, 1), True)]
    for found, wanted in zip(
        *(batch_scores(model, clips, Scoring(None), [0, 0]) for model in (speech, reference)), strict=True
    ):
        assert found == pytest.approx(wanted)

    # Greedy decoding after a spoken prompt of whole frames.
    (samples_S,) = torch.rand(1, 10 * 1920, generator=torch.Generator().manual_seed(0)) - 0.5
    ids_1L = text_tokenizer("<audio>" + "<0_0>" * 10, return_tensors="pt").input_ids
    spoken = {"input_values": samples_S[None, None], "input_values_cutoffs": torch.tensor([[len(samples_S)]])}
    greedy = {"do_sample": False, "depth_decoder_do_sample": False}
    theirs_TQ = csm.generate(ids_1L, max_new_tokens=5, **spoken, **greedy)[0]
    prompt_TQ = speech.codec.encode_as_released(samples_S)
    (ours_TQ,) = continue_codes(speech, prompt_TQ, SamplingOptions(seconds=0.4, temperature=0))
    assert torch.equal(ours_TQ[10:], theirs_TQ)

    # Greedy decoding with the folder's codec. Codes are equal until transformers draws the end in a deep level only.
    ids_1L = text_tokenizer("<audio>", return_tensors="pt").input_ids
    theirs_TQ = csm.generate(ids_1L, max_new_tokens=25, **greedy)[0]
    none_TQ = torch.empty(0, Q, dtype=torch.long)
    (ours_TQ,) = continue_codes(speech, none_TQ, SamplingOptions(seconds=2.0, temperature=0))
    is_end_T = (theirs_TQ == K).any(dim=1).tolist()
    length = is_end_T.index(True) if True in is_end_T else len(is_end_T)
    assert length > 5, "the comparison has frames"
    assert torch.equal(ours_TQ[:length], theirs_TQ[:length])
    (audio_S,) = csm.generate(ids_1L, output_audio=True, max_new_tokens=length, **greedy)
    torch.testing.assert_close(audio_S, speech.codec.decode(ours_TQ[:length]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("share", [0.0625, 0.5])
def test_frames_are_drawn_anew_in_each_epoch_and_alike_on_any_ranks(tokenizer, share):
    """The frames depend on the position of a clip in the order, and not on the rank that reads it."""
    corpora = [Stream("audio", SimpleNamespace(rows_per_unit=np.array([50, 50]), fingerprint="a"))]
    drawn = {}
    for dp_world_size in (1, 2):
        for rank in range(dp_world_size):
            order = ShuffledOrder(corpora, [1.0], rank, dp_world_size, shuffle_window=50, seed=1)
            loader = SpeechDataLoader(
                [], order, SimpleNamespace(tokenizer=tokenizer), workers={}, depth_train_fraction=share
            )
            for ref in itertools.islice(order, 200 // dp_world_size):
                labels_NW = np.zeros((201, 2), dtype=int)
                loader._train_some_frames(ref, labels_NW)
                frames_T = labels_NW[:, 1] == 0
                assert np.array_equal(drawn.setdefault(ref, frames_T), frames_T)
    assert len(drawn) == 200, "two epochs"
    assert len({frames_T.tobytes() for frames_T in drawn.values()}) == 200
    assert np.mean(list(drawn.values())) == pytest.approx(share, rel=0.05)


@pytest.mark.parametrize(
    ("recipe", "shares", "wanted"),
    [
        ("uniform", [1.0] * 4, [1.0, 1.0, 1.0, 1.0]),
        ("semantic:100", [1.0] * 4, [400 / 103, 4 / 103, 4 / 103, 4 / 103]),
        ("geometric:8", [1.0] * 4, [32 / 15, 16 / 15, 8 / 15, 4 / 15]),
        ("3, 2, 2, 1", [1.0] * 4, [1.5, 1.0, 1.0, 0.5]),
        # A quarter of the frames has the weight of all frames. The mean weight of existing targets is one.
        ("uniform", [1.0, 0.25, 0.25, 0.25], [7 / 16, 7 / 4, 7 / 4, 7 / 4]),
    ],
)
def test_level_weights(recipe, shares, wanted):
    found = level_weights(recipe, shares)
    assert found == pytest.approx(wanted)
    assert sum(w * s for w, s in zip(found, shares, strict=True)) / sum(shares) == pytest.approx(1)


@pytest.mark.parametrize("recipe", ["semantic:0", "geometric:x", "1,1,1", "linear"])
def test_impossible_level_weights_are_refused(recipe):
    with pytest.raises(UserError, match=r"loss.level_weights is '.*'; set 'uniform'"):
        level_weights(recipe, [1.0] * 4)
