"""Training tasks: ids and labels equal a plain construction, and losses equal those of Hugging Face models."""

import itertools
import json
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from test_hierarchical import K, Q, built, in_transformers, run
from test_order import world_state
from transformers import LlamaForCausalLM

from llama_mimi.checkpoint.architectures import save_run_record, speech_config
from llama_mimi.checkpoint.conversion import convert_checkpoint
from llama_mimi.checkpoint.csm import csm_state
from llama_mimi.checkpoint.huggingface import hf_config, llama_state
from llama_mimi.corpora.code_shards import CodedClip
from llama_mimi.corpora.utterances import Utterances
from llama_mimi.data.dataloader import SpeechDataLoader
from llama_mimi.data.examples import ExampleBuilder
from llama_mimi.data.order import ShuffledOrder, Stream
from llama_mimi.data.packing import BatchPacker
from llama_mimi.generation.loading import load_speech_model
from llama_mimi.tokens.tokenizer import IGNORE_INDEX, load_speech_tokenizer
from llama_mimi.training.loss import LevelMeter, SpeechLoss

TASKS = ("audio", "tts", "asr", "interleaved", "text")
load = partial(load_speech_tokenizer, str(TINY / "llama"), str(TINY / "mimi"), Q, "llama")
texts = st.text("the doctor<audio>5_0\n", max_size=12)


def coded(num_frames, text=None, is_cut=False, seed=0):
    codes_TQ = np.random.default_rng((num_frames, seed)).integers(0, K, (num_frames, Q))
    return CodedClip(f"{num_frames}-{seed}", codes_TQ, 0.0, is_cut, text)


@st.composite
def clips(draw, task):
    """Draw what a corpus gives for a task."""
    clip = st.builds(coded, st.integers(1, 6), texts, st.booleans() if task in ("audio", "tts") else st.just(False))
    if task == "interleaved":
        return Utterances("block", draw(st.lists(st.lists(clip, min_size=1, max_size=4), min_size=1, max_size=3)))
    return CodedClip("document", text=draw(texts)) if task == "text" else draw(clip)


def plain_sequences(tokenizer, task, clip, starts_with_text=False):
    """Return the sequences of an example as lists of (id, is a target), in flattened form."""
    text_tokenizer, vocabulary = tokenizer.text_tokenizer, tokenizer.vocabulary

    def words(text, is_target):
        """Tokenise as the tokenizer does if it lacks the audio tokens."""
        backend = text_tokenizer.backend_tokenizer
        pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        return [(token.id, is_target) for piece in pieces for token in backend.model.tokenize(piece)]

    def audio(coded_clip, is_target):
        frames = coded_clip.codes_TQ.tolist()
        ids = [vocabulary.base + code * Q + level for frame in frames for level, code in enumerate(frame)]
        return [(token, is_target) for token in [*ids, *[vocabulary.audio_end_id] * (not coded_clip.is_cut)]]

    bos, start = (text_tokenizer.bos_token_id, False), vocabulary.audio_start_id
    eos = (text_tokenizer.eos_token_id, True)
    if task == "audio":
        return [[bos, (start, False), *audio(clip, True)]]
    if task == "tts":
        return [[bos, *words(clip.text, False), (start, False), *audio(clip, True)]]
    if task == "asr":
        return [[bos, (start, False), *audio(clip, False), *words(clip.text, True), eos]]
    if task == "text":
        return [[bos, *words(clip.text, True), eos]] if clip.text.strip() else []
    sequences = []
    for utterances in clip.runs:
        sequence = [bos]
        for number, utterance in enumerate(utterances):
            is_text = starts_with_text if number % 2 == 0 else not starts_with_text
            sequence += words(utterance.text, True) if is_text else [(start, True), *audio(utterance, True)]
            sequence += words("\n", True)
        sequences.append(sequence)
    return sequences


@pytest.mark.parametrize("architecture", ["flattened", "hierarchical"])
@pytest.mark.parametrize("task", TASKS)
@settings(max_examples=25, deadline=None)
@given(data=st.data(), starts_with_text=st.booleans())
def test_ids_and_labels_are_those_of_a_plain_construction(architecture, task, data, starts_with_text):
    tokenizer = load(architecture)
    clip = data.draw(clips(task))
    example = ExampleBuilder(tokenizer).build(task, clip, starts_with_text=starts_with_text)
    packer, unit, found = BatchPacker(tokenizer, 1, 999, is_packed=True, has_positions=True), 0, []
    while unit < len(example.ends_U):
        unit = packer.add(example, unit)
        inputs, labels = packer.pop()
        found.append((inputs["input"].view(999, -1), labels.view(999, -1)))
    wanted = plain_sequences(tokenizer, task, clip, starts_with_text)
    assert len(found) == len(wanted)
    for (inputs_LW, labels_LW), sequence in zip(found, wanted, strict=True):
        ids_NW, is_target_N = as_rows(tokenizer, sequence)
        num = len(ids_NW) - 1
        assert inputs_LW[:num].equal(ids_NW[:-1])
        assert labels_LW[:num].equal(torch.where(is_target_N[:, None] & (ids_NW >= 0), ids_NW, IGNORE_INDEX)[1:])
        assert labels_LW[num:].eq(IGNORE_INDEX).all()


def test_a_vocabulary_without_text_builds_audio():
    tokenizer = load_speech_tokenizer(str(TINY / "llama"), str(TINY / "mimi"), Q, "audio")
    example = ExampleBuilder(tokenizer).build("audio", coded(3))
    ids_NW = np.concatenate([example.prefix_NW, example.ids_NW])
    assert ids_NW[:, 0].tolist() == tokenizer.encode(torch.from_numpy(coded(3).codes_TQ), is_cut=False).tolist()


def as_rows(tokenizer, sequence):
    """Return ids (N, W) and a mask of targets (N,) of a flattened sequence; -1: no token."""
    vocabulary, rows, width = tokenizer.vocabulary, [], tokenizer.ids_per_position
    tokens = iter(sequence)
    for token, is_target in tokens:
        others = [-1] * (width - 1)
        if token == vocabulary.audio_end_id:
            others = [token] * (width - 1)
        elif vocabulary.base <= token < vocabulary.audio_start_id:
            others = [next(tokens)[0] for _ in range(width - 1)]
        rows.append(([token, *others], is_target))
    return torch.tensor([ids for ids, _ in rows]), torch.tensor([is_target for _, is_target in rows])


def losses_in_transformers(model, tokenizer, sequence):
    """Return the loss of each target (position, loss, row of a task in the meter), computed by a stock model."""
    args, vocabulary = model.model_args, tokenizer.vocabulary
    ids_NW, is_target_N = as_rows(tokenizer, sequence)
    if args.architecture == "flattened":
        llama = LlamaForCausalLM(hf_config(args)).eval()
        llama.load_state_dict(llama_state(model.state_dict(), args))
        logits_NV = llama(ids_NW.T).logits[0, :-1]
    else:
        csm, is_frame_N = in_transformers(model), ids_NW[:, 1] >= 0
        codes_NQ = vocabulary.entries(ids_NW)
        frames_ND = csm.backbone_model.embed_tokens(codes_NQ.where(is_frame_N[:, None], 0)[None])[0]
        inputs_ND = frames_ND.where(is_frame_N[:, None], csm.embed_text_tokens(ids_NW[:, 0]))
        hidden_ND = csm.backbone_model(inputs_embeds=inputs_ND[None]).last_hidden_state[0, :-1]
        state = csm_state(model.state_dict(), args)
        logits_NV = F.linear(hidden_ND, state.get("text_head.weight", state["embed_text_tokens.weight"]))
    targets_N = ids_NW[1:, 0].where(is_target_N[1:], IGNORE_INDEX)
    losses_N = F.cross_entropy(logits_NV, targets_N, reduction="none", ignore_index=IGNORE_INDEX)
    rows_N = torch.full_like(targets_N, Q + 1)
    is_audio_N = vocabulary.is_audio(targets_N)
    rows_N[is_audio_N] = vocabulary.level(targets_N)[is_audio_N]
    rows_N[targets_N == vocabulary.audio_end_id] = Q
    found = [(int(row), loss) for row, loss, target in zip(rows_N, losses_N, targets_N, strict=True) if target >= 0]
    if args.architecture == "hierarchical":
        is_deep_N = is_frame_N[1:] & is_target_N[1:]
        if is_deep_N.any():
            codes_nQ = codes_NQ[1:][is_deep_N]
            depth = csm.depth_decoder(F.pad(codes_nQ[:, :-1], (1, 0)), backbone_last_hidden_state=hidden_ND[is_deep_N])
            levels_nq = F.cross_entropy(depth.logits.transpose(1, 2), codes_nQ[:, 1:], reduction="none")
            for codes_Q, levels_q in zip(codes_nQ, levels_nq, strict=True):
                found += [(-1 if codes_Q[0] == K else level, loss) for level, loss in enumerate(levels_q, start=1)]
    return found


MODELS = {
    "flattened": {"architecture": "flattened"},
    "tied": {"architecture": "hierarchical", "predicts_text": True, "enable_weight_tying": True},
    "separate": {"architecture": "hierarchical", "predicts_text": True, "enable_weight_tying": False},
}


@pytest.mark.parametrize("kind", MODELS)
def test_losses_are_those_of_transformers(kind):
    """A packed batch of all tasks has the losses that stock models compute for each sequence."""
    model, tokenizer = built(**MODELS[kind], attn_type="varlen", attn_mask_type="block_causal")
    run_of_three = [coded(n, "a doctor", seed=n) for n in (2, 3, 1)]
    examples = {
        "audio": coded(4),
        "tts": coded(3, "the doctor", is_cut=True),
        "asr": coded(5, "the house"),
        "interleaved": Utterances("block", [run_of_three, run_of_three[1:]]),
        "text": CodedClip("document", text="the old doctor"),
    }
    builder, packer = ExampleBuilder(tokenizer), BatchPacker(tokenizer, 2, 128, is_packed=True, has_positions=True)
    wanted = torch.zeros(2, len(TASKS) * (Q + 2), dtype=torch.float64)
    loss_sum = 0.0
    for number, (task, clip) in enumerate(examples.items()):
        example, unit = builder.build(task, clip, starts_with_text=True), 0
        while unit < len(example.ends_U):
            unit = packer.add(example, unit, number)
        for sequence in plain_sequences(tokenizer, task, clip, starts_with_text=True):
            for row, loss in losses_in_transformers(model, tokenizer, sequence):
                loss_sum += loss.item()
                if row >= 0:
                    wanted[:, number * (Q + 2) + row] += torch.tensor([loss.item(), 1.0])
    inputs, labels = packer.pop()
    meter = LevelMeter()
    loss = SpeechLoss(tokenizer.vocabulary, meter, [1.0] * (Q + 1), len(TASKS))(run(model, inputs), labels)
    loss.backward()
    assert loss.item() == pytest.approx(loss_sum, rel=1e-5)
    torch.testing.assert_close(meter.pop()[:2], wanted, rtol=1e-5, atol=1e-5)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("kind", MODELS)
def test_a_converted_folder_has_the_losses_of_the_model(kind, tmp_path):
    model, tokenizer = built(**MODELS[kind])
    config = speech_config(model.model_args, tokenizer, str(TINY / "mimi"), tasks=["audio", "asr"])
    save_run_record(str(tmp_path / "run"), config, tokenizer)
    dcp.save(model.state_dict(), checkpoint_id=tmp_path / "run" / "checkpoint" / "step-1", no_dist=True)
    convert_checkpoint(tmp_path / "run" / "checkpoint", tmp_path / "folder")
    speech = load_speech_model(str(tmp_path / "folder"), device="cpu")
    assert speech.tasks == ["audio", "asr"]
    saved = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert saved["architectures"] == ["LlamaForCausalLM" if kind == "flattened" else "CsmForConditionalGeneration"]
    (sequence,) = plain_sequences(tokenizer, "asr", coded(4, "the doctor"))
    ids_L, is_target_L = (torch.tensor(column) for column in zip(*sequence, strict=True))
    (values_L,) = speech.log_likelihoods([ids_L], [is_target_L])
    wanted = [-loss.item() for _, loss in losses_in_transformers(model, tokenizer, sequence)]
    assert values_L[is_target_L].tolist() == pytest.approx(wanted, abs=1e-5)


class MadeUpReader:
    """Reader of the clips of a task, in units of 7 clips."""

    def __init__(self, task):
        self.name = self.fingerprint = task
        self.rows_per_unit = np.full(30, 7)
        self._task = task

    def read(self, unit):
        return [7 * unit + row for row in range(7)]

    def clips(self, row):
        if self._task == "text":
            return [CodedClip(str(row), text="the doctor " * (row % 40))]
        made = [coded(1 + (row * 7 + part) % 30, "the doctor", seed=row) for part in range(5)]
        return [Utterances(str(row), [made[:2], made[2:]]) if self._task == "interleaved" else made[0]]


def mixed_loader(tokenizer, batch_size=4, seq_len=400, rank=0, dp_world_size=1):
    streams = [Stream(task, MadeUpReader(task)) for task in TASKS]
    order = ShuffledOrder(streams, [3, 1, 2, 1, 1], rank, dp_world_size, shuffle_window=30, seed=1)
    packer = BatchPacker(tokenizer, batch_size, seq_len, is_packed=True, has_positions=True)
    return SpeechDataLoader(streams, order, packer, tasks=TASKS, workers={})


@pytest.mark.parametrize("architecture", ["flattened", "hierarchical"])
@pytest.mark.parametrize("kill_after", [1, 2, 5, 9])
def test_a_mixture_goes_on_as_if_never_killed(architecture, kill_after):
    tokenizer = load(architecture)
    whole = mixed_loader(tokenizer, seq_len=400 if architecture == "flattened" else 100)
    batches = iter(whole)
    for _ in range(kill_after):
        next(batches)
    state = world_state([whole])
    resumed = mixed_loader(tokenizer, seq_len=400 if architecture == "flattened" else 100)
    resumed.load_state_dict(state)
    for (inputs, labels), (others, other_labels) in itertools.islice(zip(batches, resumed, strict=False), 5):
        assert inputs["input"].equal(others["input"]) and labels.equal(other_labels)


@pytest.mark.parametrize("dp_world_size", [1, 3])
def test_tasks_are_drawn_by_their_weights_on_any_number_of_ranks(dp_world_size):
    drawn = [
        ref.stream
        for rank in range(dp_world_size)
        for ref in itertools.islice(mixed_loader(load("flattened"), rank=rank, dp_world_size=dp_world_size).order, 400)
    ]
    found = np.bincount(drawn) / len(drawn)
    assert found == pytest.approx(np.array([3, 1, 2, 1, 1]) / 8, abs=0.01)


def test_sequences_of_a_mixture_are_full():
    loader, shares = mixed_loader(load("flattened"), batch_size=16, seq_len=1000), []
    pop = loader.packer.pop
    loader.packer.pop = lambda: [shares.append(loader.packer.num_used / 16_000), pop()][1]
    assert len(list(itertools.islice(loader, 8))) == 8
    assert np.mean(shares) > 0.98
