"""Token sequences: what the model sees."""

import torch


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
