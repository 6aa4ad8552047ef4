"""Scores, benchmark folders and results, each as data or against the plainest loop."""

import csv
import hashlib
import shutil
from collections import Counter

import pytest
import torch
from conftest import TINY
from transformers import LlamaForCausalLM

from llama_mimi.benchmarks import BenchmarkClip, salmon_pairs, slm21_pairs, storycloze_pairs
from llama_mimi.errors import UserError
from llama_mimi.evaluation import part_results, score_clips, wilson_interval
from llama_mimi.hf import hf_config
from llama_mimi.likelihood import mean_log_likelihoods
from llama_mimi.model import FLAVORS, LlamaMimiArgs
from llama_mimi.speech_model import SpeechModel

BENCHMARKS = TINY / "benchmarks"


@pytest.fixture(scope="module")
def model(codec, sequences):
    torch.manual_seed(0)
    args = LlamaMimiArgs(**{**vars(FLAVORS["tiny"]), "vocab_size": sequences.vocabulary.size})
    return SpeechModel(LlamaForCausalLM(hf_config(args)).eval(), sequences, codec)


def random_codes(num_frames):
    return torch.randint(256, (num_frames, 4), generator=torch.Generator().manual_seed(num_frames))


@pytest.mark.parametrize("scored", ["all", "semantic"])
@pytest.mark.parametrize("is_cut", [False, True])
def test_score_is_that_of_a_plain_loop(model, scored, is_cut):
    vocabulary = model.sequences.vocabulary
    codes_TQ = random_codes(7)
    ids = [model.sequences.tokenizer.bos_token_id, vocabulary.audio_start_id]
    is_counted = [False, scored == "all"]
    for frame in codes_TQ.tolist():
        for level, code in enumerate(frame):
            ids.append(vocabulary.base + code * 4 + level)
            is_counted.append(scored == "all" or level == 0)
    if not is_cut:
        ids.append(vocabulary.audio_end_id)
        is_counted.append(True)
    with torch.no_grad():
        log_probs_LV = model.decoder(torch.tensor([ids])).logits[0].log_softmax(-1)
    values = [float(log_probs_LV[i - 1, ids[i]]) for i in range(1, len(ids)) if is_counted[i]]
    assert len(values) == (1 + 28 if scored == "all" else 7) + (not is_cut)
    (score,) = mean_log_likelihoods(model, [(codes_TQ, is_cut)], scored)
    assert score == pytest.approx(sum(values) / len(values), abs=1e-5)


def test_company_and_padding_change_no_score(model):
    clips = [(random_codes(frames), frames % 2 == 0) for frames in (3, 20, 1, 8)]
    together = mean_log_likelihoods(model, clips, "all")
    alone = [mean_log_likelihoods(model, [clip], "all")[0] for clip in clips]
    assert together == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_scores_of_files_do_not_depend_on_the_batch(model, batch_size):
    pairs = salmon_pairs(str(BENCHMARKS / "salmon"))[:4]
    clips = [clip for pair in pairs for clip in (pair.positive, pair.negative)]

    def scores(size):
        codes_hash = hashlib.sha256()
        results = [score for _, score, _ in score_clips(model, clips, "all", size, 20.0, codes_hash)]
        return results, codes_hash.hexdigest()

    (expected, expected_hash), (measured, measured_hash) = scores(3), scores(batch_size)
    assert measured == pytest.approx(expected, abs=1e-5) and measured_hash == expected_hash


def test_cut_clips_are_marked(model):
    clip = BenchmarkClip("prompt", TINY / "prompt.wav")
    ((_, cut_score, is_cut),) = score_clips(model, [clip], "all", 1, 1.0, hashlib.sha256())
    ((_, score, is_whole_cut),) = score_clips(model, [clip], "all", 1, 20.0, hashlib.sha256())
    assert is_cut and not is_whole_cut and cut_score != score


@pytest.mark.parametrize(
    ("corrects", "accuracy", "ties"),
    [([1.0, 1.0, 0.0, 1.0], 0.75, 0), ([0.5, 0.5], 0.5, 2), ([1.0, 0.5, 0.0, 0.0], 0.375, 1)],
)
def test_ties_count_half(corrects, accuracy, ties):
    pairs = [{"part": "a", "correct": correct, "is_cut": False} for correct in corrects]
    result = part_results(pairs)["a"]
    assert (result["accuracy"], result["ties"], result["count"]) == (accuracy, ties, len(corrects))


@pytest.mark.parametrize(
    # computed with statsmodels.stats.proportion.proportion_confint(method="wilson")
    ("accuracy", "count", "expected"),
    [(0.5, 200, (0.4313608, 0.5686392)), (1.0, 100, (0.9630065, 1.0)), (0.0, 10, (0.0, 0.2775328))],
)
def test_wilson_interval(accuracy, count, expected):
    assert wilson_interval(accuracy, count) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("reader", "folder", "parts"),
    [
        (salmon_pairs, "salmon", {"speaker_consistency": 200}),
        (slm21_pairs, "sLM21", {"lexical_dev": 100, "syntactic_dev": 100}),
        (storycloze_pairs, "storycloze", {"storycloze": 100}),
    ],
)
def test_tiny_benchmarks_are_read_whole(reader, folder, parts):
    pairs = reader(str(BENCHMARKS / folder))
    assert Counter(pair.part for pair in pairs) == parts
    names = {clip.name for pair in pairs for clip in (pair.positive, pair.negative)}
    files = list((BENCHMARKS / folder).rglob("*.ogg"))
    assert len(names) == len(files) == 2 * len(pairs)


def test_positives_are_the_official_ones():
    salmon = salmon_pairs(str(BENCHMARKS / "salmon"))
    assert all(pair.positive.name.endswith("_0.ogg") for pair in salmon)
    assert [int(pair.name) for pair in salmon] == list(range(200))
    correct = {}
    for gold in (BENCHMARKS / "sLM21").rglob("gold.csv"):
        with gold.open() as file:
            correct |= {row["filename"]: row["correct"] for row in csv.DictReader(file)}
    for pair in slm21_pairs(str(BENCHMARKS / "sLM21")):
        assert correct[pair.positive.name.removesuffix(".ogg")] == "1"
        assert correct[pair.negative.name.removesuffix(".ogg")] == "0"
    for pair in storycloze_pairs(str(BENCHMARKS / "storycloze")):
        assert int(pair.negative.name.split("_")[0]) == int(pair.positive.name.split("_")[0]) + 1


def test_a_salmon_index_may_have_several_negatives(tmp_path):
    folder = tmp_path / "rir_consistency"
    folder.mkdir()
    for name in ("sample_3_0", "sample_3_2", "sample_3_10"):
        (folder / f"{name}.wav").touch()
    pairs = salmon_pairs(str(tmp_path))
    assert [(pair.positive.name, pair.negative.name) for pair in pairs] == [
        ("sample_3_0.wav", "sample_3_2.wav"),
        ("sample_3_0.wav", "sample_3_10.wav"),
    ]


@pytest.mark.parametrize(
    ("reader", "folder", "odd", "message"),
    [
        (salmon_pairs, "salmon", "speaker_consistency/sample_200_0.ogg", "no counterpart"),
        (salmon_pairs, "salmon", "speaker_consistency/other.ogg", "move the odd file out"),
        (slm21_pairs, "sLM21", "lexical/dev/other.ogg", "not listed in"),
        (storycloze_pairs, "storycloze", "200_fitting.ogg", "an odd number"),
        (storycloze_pairs, "storycloze", "other.ogg", "does not begin with a number"),
        (storycloze_pairs, "storycloze", "7_again.ogg", "the same number"),
    ],
)
def test_an_odd_file_out_is_named(reader, folder, odd, message, tmp_path):
    shutil.copytree(BENCHMARKS / folder, tmp_path / folder)
    shutil.copy(TINY / "prompt.wav", tmp_path / folder / odd)
    with pytest.raises(UserError) as error:
        reader(str(tmp_path / folder))
    assert message in str(error.value) and odd.split("/")[-1] in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    shutil.copytree(BENCHMARKS / "sLM21", tmp_path / "sLM21")
    victim = next((tmp_path / "sLM21" / "syntactic" / "dev").glob("*.ogg"))
    victim.unlink()
    with pytest.raises(UserError, match=f"lists '{victim.stem}'"):
        slm21_pairs(str(tmp_path / "sLM21"))


@pytest.mark.parametrize("reader", [salmon_pairs, slm21_pairs, storycloze_pairs])
def test_an_empty_or_missing_folder_is_refused(reader, tmp_path):
    with pytest.raises(UserError, match="holds no pairs"):
        reader(str(tmp_path))
    with pytest.raises(UserError, match="give its folder with --data_dir"):
        reader(str(tmp_path / "nothing"))
