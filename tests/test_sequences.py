"""Sequences and padded batches: what the model sees and what it is trained on."""

import torch

from llama_mimi.sequences import IGNORE_INDEX


def codes(num_frames: int) -> torch.Tensor:
    return torch.randint(256, (num_frames, 4), generator=torch.Generator().manual_seed(num_frames))


def test_a2a_and_tts(sequences):
    vocabulary, tokenizer = sequences.vocabulary, sequences.tokenizer
    units = vocabulary.ids_from_codes(codes(3)).tolist()
    bos, start, end = tokenizer.bos_token_id, vocabulary.audio_start_id, vocabulary.audio_end_id
    assert sequences.sequence(codes(3), is_cut=False).tolist() == [bos, start, *units, end]
    assert sequences.sequence(codes(3), is_cut=True).tolist() == [bos, start, *units]
    text_ids = tokenizer("the doctor", add_special_tokens=False).input_ids
    tts = sequences.sequence(codes(3), is_cut=False, text="the doctor").tolist()
    assert tts == [bos, *text_ids, start, *units, end]


def test_labels_are_the_next_targets(sequences):
    ids_L = sequences.sequence(codes(2), is_cut=False, text="the doctor")
    inputs_BL, labels_BL = sequences.pad_batch([ids_L], seq_len=32)
    length = len(ids_L) - 1
    assert inputs_BL[0, :length].tolist() == ids_L[:-1].tolist()
    num_given = length - 9  # all but 8 units and </audio>
    assert labels_BL[0, :num_given].eq(IGNORE_INDEX).all()
    assert labels_BL[0, num_given:length].tolist() == ids_L[-9:].tolist()
    assert labels_BL[0, length:].eq(IGNORE_INDEX).all()


def test_a_sequence_cut_by_seq_len_has_no_end(sequences):
    ids_L = sequences.sequence(codes(10), is_cut=False)
    for seq_len in (len(ids_L) - 2, len(ids_L) - 1):
        inputs_BL, labels_BL = sequences.pad_batch([ids_L], seq_len)
        assert inputs_BL.shape == labels_BL.shape == (1, seq_len)
        assert (sequences.vocabulary.audio_end_id in labels_BL) == (seq_len == len(ids_L) - 1)
