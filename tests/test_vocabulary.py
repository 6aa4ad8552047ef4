"""Codes, ids and texts for any Q and K; tokenizers with and without text; sequences of clips."""

import json
import string

import pytest
import torch
from conftest import TINY
from hypothesis import given
from hypothesis import strategies as st
from simulated import text_from_codes
from tokenizers import Tokenizer, models, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llama_mimi.common.errors import UserError
from llama_mimi.tokens.tokenizer import SpeechTokenizer
from llama_mimi.tokens.vocabulary import AudioVocabulary, audio_tokenizer, extend_tokenizer, has_text

SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"]


@st.composite
def vocabularies_and_codes(draw):
    vocabulary = AudioVocabulary(draw(st.integers(1, 200_000)), draw(st.integers(1, 4096)), draw(st.integers(1, 32)))
    num_frames = draw(st.integers(0, 8))
    code = st.integers(0, vocabulary.codebook_size - 1)
    num_codes = num_frames * vocabulary.num_quantizers
    codes = draw(st.lists(code, min_size=num_codes, max_size=num_codes))
    return vocabulary, torch.tensor(codes, dtype=torch.long).view(num_frames, vocabulary.num_quantizers)


@given(vocabularies_and_codes())
def test_round_trips(case):
    vocabulary, codes_TQ = case
    ids_L = vocabulary.ids_from_codes(codes_TQ)
    Q = vocabulary.num_quantizers
    assert ids_L.tolist() == [vocabulary.base + c * Q + q for frame in codes_TQ.tolist() for q, c in enumerate(frame)]
    assert torch.equal(vocabulary.entries(ids_L).view(-1, Q), codes_TQ) and bool(vocabulary.is_audio(ids_L).all())
    assert vocabulary.level(ids_L).tolist() == [*range(Q)] * len(codes_TQ)


def test_llama_3_ids():
    vocabulary = AudioVocabulary(base=128_256, codebook_size=2048, num_quantizers=4)
    ids = vocabulary.ids_from_codes(torch.tensor([[0] * 4, [2047] * 4])).tolist()
    assert ids == [*range(128_256, 128_260), *range(136_444, 136_448)]
    assert (vocabulary.audio_start_id, vocabulary.audio_end_id, vocabulary.size) == (136_448, 136_449, 136_450)


@pytest.mark.parametrize("num_quantizers", [1, 4, 8])
def test_tokenizer_agrees_with_arithmetic(num_quantizers, tmp_path):
    base = AutoTokenizer.from_pretrained(TINY / "llama")
    tokenizer, vocabulary = extend_tokenizer(base, 256, num_quantizers)
    codes_TQ = torch.randint(256, (50, num_quantizers), generator=torch.Generator().manual_seed(0))
    tokens = vocabulary.ids_from_codes(codes_TQ).tolist()
    ids = [tokenizer.bos_token_id, vocabulary.audio_start_id, *tokens, vocabulary.audio_end_id]
    assert tokenizer(text_from_codes(codes_TQ)).input_ids == ids
    assert len(tokenizer) == vocabulary.size == 512 + 256 * num_quantizers + 2
    tokenizer.save_pretrained(tmp_path)
    again, same = extend_tokenizer(AutoTokenizer.from_pretrained(tmp_path), 256, num_quantizers)
    assert same == vocabulary and len(again) == vocabulary.size
    for K, Q in ((256, num_quantizers + 1), (512, num_quantizers), (128, 2 * num_quantizers)):
        with pytest.raises(UserError, match=f"{Q} quantizers with {K} codes"):
            extend_tokenizer(again, K, Q)


FRAGMENTS = [*SPECIAL, "<audio>", "</audio>", "<5_0>", "<255_3>", "<", "_0>", "|>", "12_3", " ", "\n", "é", "語"]


@given(st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=8).map("".join))
def test_a_transcript_is_plain_text(tokenizer, text):
    """A transcript has the same ids in a tokenizer without special tokens and audio tokens."""
    plain = json.loads((TINY / "llama" / "tokenizer.json").read_text()) | {"added_tokens": [], "post_processor": None}
    bos, *ids, start = tokenizer.prefix_ids(text)
    assert ids == Tokenizer.from_str(json.dumps(plain)).encode(text).ids
    assert (bos, start) == (508, tokenizer.vocabulary.audio_start_id) and all(id_ < 508 for id_ in ids)
    assert tokenizer.text_tokenizer.decode(ids) == text


@st.composite
def text_tokenizers(draw):
    """Draw tokenizers with BOS and optional other special tokens. Special tokens have any positions among the words."""
    words = draw(st.permutations(["<s>", "</s>", "<pad>", *string.ascii_letters]))
    others = st.dictionaries(st.sampled_from(["eos_token", "pad_token"]), st.sampled_from(["<s>", "</s>", "<pad>"]))
    roles = {"bos_token": "<s>"} | dict(sorted(draw(others).items()))
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="a"))
    adds_bos = draw(st.booleans())
    if adds_bos:
        bos = ("<s>", words.index("<s>"))
        tokenizer.post_processor = processors.TemplateProcessing(single=["<s>", "$A"], special_tokens=[bos])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles), roles, adds_bos


@given(text_tokenizers(), st.integers(1, 8), st.integers(1, 4), st.data())
def test_without_text_the_audio_tokens_follow_the_special_tokens(case, K, Q, data):
    text_tokenizer, roles, adds_bos = case
    assert has_text(text_tokenizer)
    tokenizer, vocabulary = extend_tokenizer(audio_tokenizer(text_tokenizer), K, Q)
    special = list(dict.fromkeys(roles.values()))  # in the order bos, eos, pad
    assert tokenizer.convert_ids_to_tokens(range(len(special))) == special
    assert tokenizer.special_tokens_map == roles and not has_text(tokenizer)
    assert vocabulary == AudioVocabulary(len(special), K, Q) and len(tokenizer) == vocabulary.size
    assert SpeechTokenizer(tokenizer, vocabulary).adds_bos == adds_bos

    codes = data.draw(st.lists(st.lists(st.integers(0, K - 1), min_size=Q, max_size=Q), min_size=1, max_size=4))
    text = text_from_codes(torch.tensor(codes))
    tokens = [len(special) + code * Q + level for frame in codes for level, code in enumerate(frame)]
    ids = [0] * adds_bos + [vocabulary.audio_start_id, *tokens, vocabulary.audio_end_id]
    assert tokenizer(text).input_ids == ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_tokenizer_without_text_is_not_changed(tmp_path):
    small, vocabulary = extend_tokenizer(audio_tokenizer(AutoTokenizer.from_pretrained(TINY / "llama")), 256, 4)
    small.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert audio_tokenizer(again) is again and extend_tokenizer(again, 256, 4) == (again, vocabulary)
    with pytest.raises(UserError, match="8 quantizers with 128 codes"):
        extend_tokenizer(audio_tokenizer(again), 128, 8)


@pytest.mark.parametrize("code", [-1, 5])
def test_codes_outside_the_codebook_are_refused(code):
    with pytest.raises(ValueError, match=r"\[0, 5\)"):
        AudioVocabulary(base=10, codebook_size=5, num_quantizers=2).ids_from_codes(torch.tensor([[0, code]]))


def test_codes_of_another_number_of_levels_are_refused():
    """Broadcasting would return wrong ids."""
    with pytest.raises(ValueError, match=r"expected codes of shape \(T, 1\), got \(1, 4\)"):
        AudioVocabulary(base=10, codebook_size=5, num_quantizers=1).ids_from_codes(torch.zeros(1, 4))


CODES_TQ = torch.randint(256, (5, 4), generator=torch.Generator().manual_seed(5))


def test_a2a_and_tts(tokenizer):
    vocabulary, text_tokenizer = tokenizer.vocabulary, tokenizer.text_tokenizer
    tokens = vocabulary.ids_from_codes(CODES_TQ).tolist()
    bos, start, end = text_tokenizer.bos_token_id, vocabulary.audio_start_id, vocabulary.audio_end_id
    assert tokenizer.encode(CODES_TQ, is_cut=False).tolist() == [bos, start, *tokens, end]
    assert tokenizer.encode(CODES_TQ, is_cut=True).tolist() == [bos, start, *tokens]
    text_ids = text_tokenizer("the doctor", add_special_tokens=False).input_ids
    tts = tokenizer.encode(CODES_TQ, is_cut=False, text="the doctor").tolist()
    assert tts == [bos, *text_ids, start, *tokens, end]
