"""Packing: each frame is used once, and the labels are correct."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_mimi.corpora.code_shards import CodedClip
from llama_mimi.data.examples import ExampleBuilder
from llama_mimi.data.packing import BatchPacker
from llama_mimi.tokens.tokenizer import IGNORE_INDEX


def codes(num_frames: int) -> torch.Tensor:
    return torch.randint(256, (num_frames, 4), generator=torch.Generator().manual_seed(num_frames))


def packer(tokenizer, batch_size, seq_len, is_packed=True):
    return BatchPacker(tokenizer, batch_size, seq_len, is_packed=is_packed, has_positions=True)


def example(packer, codes_TQ, is_cut=False, text=None):
    clip = CodedClip("clip", codes_TQ.numpy(), 0.0, is_cut, text)
    return ExampleBuilder(packer.tokenizer).build("tts" if text else "audio", clip)


def fill(packer, clips):
    """Return all batches of the clips (codes, is_cut, text)."""
    batches = []
    for clip in clips:
        own, unit = example(packer, *clip), 0
        while unit < len(own.ends_U):
            begun, unit = unit, packer.add(own, unit)
            if packer.is_full or unit == begun:
                batches.append((packer.num_frames, *packer.pop()))
    return [*batches, (packer.num_frames, *packer.pop())] if packer.num_used else batches


def pieces(batches):
    """Yield ids and labels of each clip in the packed sequences. Positions show where a clip begins."""
    for _, inputs, labels_BL in batches:
        for ids_L, positions_L, labels_L in zip(inputs["input"], inputs["positions"], labels_BL, strict=True):
            starts = [*(positions_L == 0).nonzero().flatten().tolist(), len(ids_L)]
            for start, end in itertools.pairwise(starts):
                if (labels_L[start:end] != IGNORE_INDEX).any():
                    assert positions_L[start:end].tolist() == list(range(end - start))
                    yield ids_L[start:end], labels_L[start:end]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    cuts=st.lists(st.booleans(), min_size=12, max_size=12),
    batch_size=st.integers(1, 3),
    seq_len=st.integers(6, 90),
)
def test_packed_rows_hold_every_frame_once(tokenizer, lengths, cuts, batch_size, seq_len):
    vocabulary = tokenizer.vocabulary
    clips = [(codes(length), is_cut, None) for length, is_cut in zip(lengths, cuts, strict=False)]
    batches = fill(packer(tokenizer, batch_size, seq_len), clips)
    assert sum(num_frames for num_frames, _, _ in batches) == sum(lengths[: len(clips)])
    units, ends = [], 0
    for ids_L, labels_L in pieces(batches):
        assert ids_L[:2].tolist() == [tokenizer.text_tokenizer.bos_token_id, vocabulary.audio_start_id]
        targets = labels_L[labels_L != IGNORE_INDEX]
        assert labels_L[0] == IGNORE_INDEX and labels_L[1:][: len(targets)].equal(targets)
        assert ids_L[2 : 1 + len(targets)].equal(targets[:-1]), "inputs are the targets, one place later"
        ends += int(targets[-1] == vocabulary.audio_end_id)
        units.append(targets[vocabulary.is_audio(targets)])
        assert len(units[-1]) % 4 == 0 and len(units[-1]), "cut after whole frames"
    expected = torch.cat([vocabulary.ids_from_codes(codes_TQ) for codes_TQ, _, _ in clips])
    assert torch.cat(units).equal(expected)
    assert ends == sum(not is_cut for _, is_cut, _ in clips), "speech that ended ends once"


def test_packed_rows_are_nearly_full(tokenizer):
    batches = fill(packer(tokenizer, 4, 1024), [(codes(length), False, None) for length in range(150, 200)])[:-1]
    assert torch.cat([labels_BL for _, _, labels_BL in batches]).ne(IGNORE_INDEX).float().mean() > 0.99


def test_text_stays_with_its_audio(tokenizer):
    clips = [(codes(length), False, "the doctor") for length in (10, 12, 30, 5)]
    rows = packer(tokenizer, 1, 100)
    found = list(pieces(fill(rows, clips)))
    assert rows.num_cut == 1  # 30 frames are 120 audio tokens
    text_ids = tokenizer.text_tokenizer("the doctor", add_special_tokens=False).input_ids
    assert all(ids_L[1 : 1 + len(text_ids)].tolist() == text_ids for ids_L, _ in found)
    units = [int(tokenizer.vocabulary.is_audio(labels_L).sum()) for _, labels_L in found]
    assert units[0] == 40 and units[1] == 48 and units[3] == 20 and 80 < units[2] < 100


@pytest.mark.parametrize("is_packed", [True, False])
def test_a_row_has_room_for_a_frame_behind_a_text(tokenizer, is_packed):
    length = len(tokenizer.prefix_ids("the doctor"))
    for seq_len, has_room in ((length + 3, True), (length + 2, False)):
        rows = packer(tokenizer, 1, seq_len, is_packed)
        assert (rows.no_room(example(rows, codes(2), False, "the doctor")) is None) == has_room
        ((_, _, labels_BL),) = fill(rows, [(codes(2), False, "the doctor")])
        assert int((labels_BL != IGNORE_INDEX).sum()) == (4 if has_room else 3)


@pytest.mark.parametrize("text", [None, "the doctor"])
def test_padded_rows_hold_one_clip(tokenizer, text):
    """The label at a position is the next id; positions of the prefix have no label."""
    lengths, num_given = (3, 9, 1), len(tokenizer.prefix_ids(text)) - 1
    clips = [(codes(length), False, text) for length in lengths]
    ((_, inputs, labels_BL),) = fill(packer(tokenizer, 3, 32, is_packed=False), clips)
    for row, length in enumerate(lengths):
        ids_L = tokenizer.encode(codes(length), is_cut=False, text=text)
        held = min(len(ids_L) - 1, 32)
        assert inputs["input"][row, :held].equal(ids_L[:held])
        assert inputs["positions"][row].tolist() == [*range(held), *range(32 - held)]
        assert labels_BL[row, num_given:held].equal(ids_L[num_given + 1 : held + 1])
        assert labels_BL[row, :num_given].eq(IGNORE_INDEX).all() and labels_BL[row, held:].eq(IGNORE_INDEX).all()
        assert (tokenizer.vocabulary.audio_end_id in labels_BL[row]) == (length != 9), "a row too short has no </audio>"


@pytest.mark.parametrize("is_packed", [True, False])
def test_an_empty_batch_has_no_target(tokenizer, is_packed):
    inputs, labels_BL = packer(tokenizer, 2, 16, is_packed).pop()
    assert labels_BL.eq(IGNORE_INDEX).all() and inputs["positions"].tolist() == [list(range(16))] * 2
