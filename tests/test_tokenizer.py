"""Token sequences: what the model sees."""

import pytest
import torch
from conftest import TINY

from llama_mimi.evaluation.scoring import Scoring, scored_sequence
from llama_mimi.tokens.tokenizer import load_speech_tokenizer


def codes(num_frames: int) -> torch.Tensor:
    return torch.randint(256, (num_frames, 4), generator=torch.Generator().manual_seed(num_frames))


def test_a2a_and_tts(tokenizer):
    vocabulary, text_tokenizer = tokenizer.vocabulary, tokenizer.text_tokenizer
    units = vocabulary.ids_from_codes(codes(3)).tolist()
    bos, start, end = text_tokenizer.bos_token_id, vocabulary.audio_start_id, vocabulary.audio_end_id
    assert tokenizer.encode(codes(3), is_cut=False).tolist() == [bos, start, *units, end]
    assert tokenizer.encode(codes(3), is_cut=True).tolist() == [bos, start, *units]
    text_ids = text_tokenizer("the doctor", add_special_tokens=False).input_ids
    tts = tokenizer.encode(codes(3), is_cut=False, text="the doctor").tolist()
    assert tts == [bos, *text_ids, start, *units, end]


@pytest.mark.parametrize("is_cut", [False, True])
@pytest.mark.parametrize("levels", [None, (0,)])
@pytest.mark.parametrize("as_released", [False, True])
def test_without_text_sequences_and_scores_are_of_the_same_tokens(tokenizer, as_released, levels, is_cut):
    small = load_speech_tokenizer(str(TINY / "llama"), str(TINY / "mimi"), 4, "audio")
    assert small.vocabulary.base == 3 and small.adds_bos
    tokens, scored = [], []
    for kind in (tokenizer, small):
        ids_L, is_scored_L = scored_sequence(kind, codes(5), is_cut=is_cut, scoring=Scoring(levels, as_released))
        tokens.append(kind.text_tokenizer.convert_ids_to_tokens(ids_L.tolist()))
        scored.append(is_scored_L.tolist())
    assert tokens[0] == tokens[1] and tokens[0][:2] == ["<|begin_of_text|>", "<audio>"]
    assert scored[0] == scored[1]
