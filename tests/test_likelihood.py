"""Scores of clips, compared with a plain loop over the full logits of one clip."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY
from simulated import text_from_codes
from tokenizers import processors
from transformers import LlamaForCausalLM

from llama_mimi.audio.mimi import MimiCodec
from llama_mimi.checkpoint.huggingface import hf_config
from llama_mimi.common.distributed import DistributedContext
from llama_mimi.common.errors import UserError
from llama_mimi.common.resume import ProgressLog
from llama_mimi.corpora.code_shards import CodedClip
from llama_mimi.evaluation.benchmarks import Clip
from llama_mimi.evaluation.options import TEXT_RULES, EvaluationOptions, Scoring
from llama_mimi.evaluation.scoring import (
    batch_scores,
    score_clips,
    score_texts,
    shared_prompt,
    text_sequences,
)
from llama_mimi.generation.flattened import FlattenedModel
from llama_mimi.model.llama import FLAVORS, LlamaMimiArgs
from llama_mimi.tokens.tokenizer import SpeechTokenizer, load_speech_tokenizer


@pytest.fixture(scope="module")
def models():
    """Return random models by number of levels (4, 8) and by whether the tokenizer adds BOS."""
    made = {}
    for Q in (4, 8):
        tokenizer = load_speech_tokenizer(str(TINY / "llama"), str(TINY / "mimi"), Q)
        torch.manual_seed(Q)
        args = LlamaMimiArgs(**{**vars(FLAVORS["tiny"]), "vocab_size": tokenizer.vocabulary.size})
        decoder = LlamaForCausalLM(hf_config(args)).eval()
        codec = MimiCodec(str(TINY / "mimi"), Q)
        made[Q, True] = FlattenedModel(decoder, tokenizer, codec)
        without_bos = copy.deepcopy(tokenizer.text_tokenizer)
        without_bos.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
        made[Q, False] = FlattenedModel(decoder, SpeechTokenizer(without_bos, tokenizer.vocabulary), codec)
    return made


def random_codes(num_frames, Q=4):
    return torch.randint(256, (num_frames, Q), generator=torch.Generator().manual_seed(num_frames))


def plain_mean(model, ids, scored_positions, *, is_grammar=False):
    """Return the mean log-likelihood of the tokens at some positions, from full logits.

    With ``is_grammar``, the softmax is over the codes of a level and, at level 0, ``</audio>``.
    """
    vocabulary, Q = model.tokenizer.vocabulary, model.tokenizer.vocabulary.num_quantizers
    with torch.no_grad():
        logits_LV = model.decoder(torch.tensor([ids])).logits[0].double()
    values = []
    for i in scored_positions:
        level = (i - 2) % Q  # after BOS and <audio>
        admissible = [vocabulary.base + code * Q + level for code in range(256)]
        admissible += [vocabulary.audio_end_id] if level == 0 else []
        admissible = admissible if is_grammar else list(range(logits_LV.shape[1]))
        values.append(float(torch.log_softmax(logits_LV[i - 1, admissible], dim=0)[admissible.index(ids[i])]))
    return sum(values) / len(values)


@pytest.mark.parametrize("is_cut", [False, True])
@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("Q", [4, 8])
@pytest.mark.parametrize("levels", [None, (0,)])
def test_preset_original_is_the_first_release(models, levels, Q, adds_bos, is_cut):
    """The tokenizer may add BOS. Cut clips also end with ``</audio>``. Positions determine the scored tokens."""
    model = models[Q, adds_bos]
    codes_TQ = random_codes(7, Q)
    ids = model.tokenizer.text_tokenizer(text_from_codes(codes_TQ)).input_ids
    assert len(ids) == adds_bos + 1 + 7 * Q + 1
    positions = list(range(1, len(ids))) if levels is None else list(range(2, len(ids), Q))
    tokens = [model.tokenizer.text_tokenizer.convert_ids_to_tokens(ids[i]) for i in positions]
    if levels is None:
        assert tokens[0] == ("<audio>" if adds_bos else f"<{codes_TQ[0, 0]}_0>") and tokens[-1] == "</audio>"
    elif adds_bos:
        assert tokens == [f"<{code}_0>" for code in codes_TQ[:, 0].tolist()] + ["</audio>"]
    else:  # without BOS, level 1 is scored
        assert tokens == [f"<{code}_1>" for code in codes_TQ[:, 1].tolist()]
    (scores,) = batch_scores(model, [(codes_TQ, is_cut)], Scoring(levels, as_released=True), [0])
    assert scores == {"primary": pytest.approx(plain_mean(model, ids, positions), abs=1e-5)}


@pytest.mark.parametrize("is_cut", [False, True])
@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("Q", [4, 8])
@pytest.mark.parametrize("levels", [None, (0,), (0, 2)])
def test_preset_official_scores_what_it_says(models, levels, Q, adds_bos, is_cut):
    """Sequences always begin with BOS. ``<audio>`` is never scored, because no model is trained to predict it."""
    model = models[Q, adds_bos]
    vocabulary = model.tokenizer.vocabulary
    codes_TQ = random_codes(7, Q)
    ids = [model.tokenizer.text_tokenizer.bos_token_id, vocabulary.audio_start_id]
    positions = []
    for frame in codes_TQ.tolist():
        for level, code in enumerate(frame):
            if levels is None or level in levels:
                positions.append(len(ids))
            ids.append(vocabulary.base + code * Q + level)
    if not is_cut:
        positions.append(len(ids))
        ids.append(vocabulary.audio_end_id)
    (scores,) = batch_scores(model, [(codes_TQ, is_cut)], Scoring(levels), [0])
    assert scores["primary"] == pytest.approx(plain_mean(model, ids, positions), abs=1e-5)
    (grammar,) = batch_scores(model, [(codes_TQ, is_cut)], Scoring(levels, likelihood="grammar"), [0])
    assert grammar["primary"] == pytest.approx(plain_mean(model, ids, positions, is_grammar=True), abs=1e-5)
    assert grammar["primary"] > scores["primary"] + 0.5


@pytest.mark.parametrize("levels", [None, (0,), (1, 3)])
def test_further_rules_are_plain_means(models, levels, tmp_path):
    """All rules of one command, for clips with several prompts, without a shared prompt, and cut clips."""
    model, Q = models[4, True], 4
    vocabulary = model.tokenizer.vocabulary
    wanted = set(range(Q) if levels is None else levels)
    codes = {"a": random_codes(7), "b": random_codes(9), "cut": random_codes(6)}
    clips = [("a", 3), ("b", 3), ("a", 5), ("cut", 5), ("a", 0)]

    def plain(name, levels, first=0):
        """Return the mean over some levels of the frames from ``first`` on, which the model reads after <audio>."""
        ids = [model.tokenizer.text_tokenizer.bos_token_id, vocabulary.audio_start_id]
        ids += vocabulary.ids_from_codes(codes[name][first:]).tolist() + [vocabulary.audio_end_id] * (name != "cut")
        return ids, [i for i in range(2, len(ids)) if (i - 2) % Q in levels or ids[i] == vocabulary.audio_end_id]

    coded = {name: CodedClip(name, codes_TQ.numpy(), 0.0, name == "cut") for name, codes_TQ in codes.items()}
    log = ProgressLog(tmp_path, {})
    found = score_clips(model, coded, clips, Scoring(levels), 100, log, DistributedContext())
    for (name, prompt), scores in zip(clips, found, strict=True):
        ids, positions = plain(name, wanted)
        rules = {"primary": plain_mean(model, ids, positions)}
        rules |= {} if levels == (0,) else {"level_0": plain_mean(model, *plain(name, {0}))}
        rules |= {} if levels is None else {"all_levels": plain_mean(model, *plain(name, set(range(Q))))}
        rules["after_prompt"] = plain_mean(model, ids, [i for i in positions if i >= 2 + prompt * Q])
        without = plain_mean(model, *plain(name, wanted, prompt)) if prompt else 0.0
        rules["normalised"] = rules["after_prompt"] - without
        assert scores == pytest.approx(rules, abs=1e-5)
    assert len({scores["after_prompt"] for scores in found}) == len(clips)
    again = score_clips(model, coded, clips, Scoring(levels), 100, log, DistributedContext())
    assert again == found  # from the log


def test_scores_of_texts_are_plain_means(models, tmp_path):
    """Transcripts, and stories whose prompt or ending is text. All tokens of the vocabulary are normalised over."""
    model, Q, frames = models[4, True], 4, 3
    vocabulary, text_tokenizer = model.tokenizer.vocabulary, model.tokenizer.text_tokenizer
    codes_TQ = random_codes(7)
    ids_T = vocabulary.ids_from_codes(codes_TQ).tolist()
    bos, start, end = text_tokenizer.bos_token_id, vocabulary.audio_start_id, vocabulary.audio_end_id

    def tokens(text):
        return text_tokenizer(text, add_special_tokens=False).input_ids

    whole = [bos, *tokens("A cat sat. It slept."), text_tokenizer.eos_token_id]
    spoken = [bos, *tokens("A cat sat."), *tokens("\n"), start, *ids_T[frames * Q :], end]
    first = spoken.index(start) + 1
    written = [bos, start, *ids_T[: frames * Q], end, *tokens("\n"), *tokens("It slept."), *tokens("\n")]
    expected = {
        "text": plain_mean(model, whole, range(1, len(whole))),
        "text_prompt": plain_mean(model, spoken, range(first, len(spoken), Q)),
        "text_ending": plain_mean(model, written, range(frames * Q + 4, len(written))),  # after the newline
    }
    cut = plain_mean(model, spoken[:-1], range(first, len(spoken) - 1, Q))

    seconds = (frames + 0.5) / model.codec.frame_rate_hz  # in the fourth frame, which belongs to the ending
    story = Clip("a", TINY, text="It slept.", prompt="A cat sat.", prompt_seconds=seconds)
    coded = CodedClip("a", codes_TQ.numpy(), 0.0, False)
    clips = [
        (story, coded),
        (story, replace(coded, is_cut=True)),
        (replace(story, prompt_seconds=7 / model.codec.frame_rate_hz), coded),  # the ending has no frame
        (replace(story, prompt_seconds=math.nan), coded),
        (Clip("b", TINY), coded),
    ]
    sequences = [text_sequences(model, *clip, Scoring((0,)), TEXT_RULES) for clip in clips]
    log = ProgressLog(tmp_path, {})
    found = score_texts(model, sequences, 50, log, DistributedContext())
    only_text = {"text": expected["text"]}
    for scores, wanted in zip(
        found, (expected, expected | {"text_prompt": cut}, only_text, only_text, {}), strict=True
    ):
        assert scores == pytest.approx(wanted, abs=1e-5)
    assert score_texts(model, sequences, 50, log, DistributedContext()) == found  # from the log
    assert text_sequences(model, story, coded, Scoring((0,)), ["text"]).keys() == {"text"}


@pytest.mark.parametrize(
    ("first", "second", "frames"),
    [
        ([[1, 2], [3, 4], [5, 6]], [[1, 2], [3, 4], [7, 6], [8, 8]], 2),
        ([[1, 2], [3, 4], [5, 6]], [[1, 2], [3, 9], [5, 6]], 1),  # a frame is equal only if all its levels are
        ([[1, 2], [3, 4]], [[9, 2], [3, 4]], 0),
        ([[1, 2], [3, 4]], [[1, 2], [3, 4], [5, 6]], 1),  # a prefix of the other clip: one frame is left
        ([[1, 2], [3, 4]], [[1, 2], [3, 4]], 1),
        ([[1, 2]], [[1, 2], [3, 4]], 0),
    ],
)
def test_a_prompt_is_the_common_prefix_in_whole_frames(first, second, frames):
    assert (
        shared_prompt(np.array(first), np.array(second)) == frames == shared_prompt(np.array(second), np.array(first))
    )


def test_scores_do_not_depend_on_how_many_logits_are_made_at_once(models, monkeypatch):
    clips = [(random_codes(frames), False) for frames in (3, 20)]
    expected = batch_scores(models[4, True], clips, Scoring(None), [0, 0])
    monkeypatch.setattr("llama_mimi.generation.speech_model.POSITIONS_AT_ONCE", 7)
    for found, wanted in zip(batch_scores(models[4, True], clips, Scoring(None), [0, 0]), expected, strict=True):
        assert found == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(
    ("levels", "flags", "name"),
    [
        (None, {"levels": "all", "likelihood": "softmax"}, "official"),
        ((0,), {"levels": "all"}, "official-all_levels"),
        (None, {"levels": "1,0", "limit": 3}, "official-levels_0_1-limit_3"),
        (None, {"likelihood": "grammar", "levels": "0"}, "official-levels_0-grammar"),
        ((0,), {"preset": "original", "levels": "0", "codec_sliding_window": False}, "original"),
        # Wrong flags.
        (None, {"levels": "0,-1"}, "--levels is '0,-1'"),
        (None, {"max_audio_seconds": -1.0}, "--max_audio_seconds is -1"),
        (None, {"preset": "original", "likelihood": "grammar"}, "--preset original does not allow"),
        (None, {"preset": "original", "max_audio_seconds": 5.0}, "--preset original does not allow"),
        (None, {"preset": "original", "codec_sliding_window": True}, "--preset original does not allow"),
    ],
)
def test_results_are_named_by_what_differs_from_the_preset(levels, flags, name):
    if name.startswith("--"):
        with pytest.raises(UserError, match=name):
            EvaluationOptions(**flags).scoring(levels)
        return
    found, scoring = EvaluationOptions(**flags).scoring(levels)
    assert found == name and scoring.as_released == (name == "original")
