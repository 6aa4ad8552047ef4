"""Evaluation of a benchmark: encoding, scoring, kills, ranks and result files."""

import copy
import itertools
import json
import math
import shutil
import time
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from bench_eval import score_alone
from conftest import ROOT, TINY, run_here
from forked_ranks import ForkedRanks, run_ranks
from transformers import LlamaForCausalLM

from llama_mimi.audio.mimi import MimiCodec
from llama_mimi.audio.reading import AudioError, read_audio
from llama_mimi.checkpoint.huggingface import hf_config
from llama_mimi.common.distributed import DistributedContext
from llama_mimi.common.errors import UserError
from llama_mimi.common.resume import ProgressLog
from llama_mimi.corpora.code_shards import CodedClip
from llama_mimi.evaluation.benchmarks import SALMON_PARTS, Benchmark, Clip, Pair, limited, read_salmon
from llama_mimi.evaluation.codes import encode_clips
from llama_mimi.evaluation.options import Scoring
from llama_mimi.evaluation.results import FORMAT, check_earlier, results
from llama_mimi.evaluation.scoring import batch_scores, score_clips
from llama_mimi.generation.flattened import FlattenedModel
from llama_mimi.model.llama import FLAVORS, LlamaMimiArgs
from llama_mimi.report.results import in_order, measure_of, read_results

SALMON = TINY / "benchmarks" / "salmon"


@pytest.fixture(scope="module")
def model(codec, tokenizer):
    torch.manual_seed(0)
    args = LlamaMimiArgs(**{**vars(FLAVORS["tiny"]), "vocab_size": tokenizer.vocabulary.size})
    return FlattenedModel(LlamaForCausalLM(hf_config(args)).eval(), tokenizer, codec)


def encode(codec, clips, folder, max_seconds=20.0, **options):
    return encode_clips(codec, clips, str(folder), DistributedContext(), max_seconds, **options)


def score(model, codes, scoring, folder, batch_tokens=4096):
    """Return the primary score of each clip."""
    clips, log = [(name, None) for name in codes], ProgressLog(folder, {})
    scores = score_clips(model, codes, clips, scoring, batch_tokens, log, DistributedContext())
    return {name: of_clip["primary"] for name, of_clip in zip(codes, scores, strict=True)}


def clips_of(*paths):
    return [Clip(path.name, path) for path in paths]


def some_clips(pattern="sample_1?_0.ogg"):
    return clips_of(*sorted((SALMON / "speaker_consistency").glob(pattern)))


def speech(tmp_path, name, seconds):
    """Repeat the prompt up to a given length and write this clip; return the clip's path."""
    samples_S = read_audio(TINY / "prompt.wav", 24_000).samples_S.numpy()
    path = tmp_path / name
    soundfile.write(path, np.resize(samples_S, round(seconds * 24_000)), 24_000)
    return path


# Encoding


def test_codes_are_encoded_once(tmp_path, codec, monkeypatch):
    clips = some_clips()
    monkeypatch.setattr("llama_mimi.evaluation.codes.CLIPS_PER_CHUNK", 4)
    ids, codes = encode(codec, clips, tmp_path)
    for clip, audio_id in zip(clips, ids, strict=True):
        (expected_TQ,) = codec.encode([read_audio(clip.source, 24_000).samples_S])
        assert np.array_equal(codes[audio_id].codes_TQ, expected_TQ.numpy())
    assert len(list(tmp_path.rglob("*.parquet"))) == 3
    monkeypatch.setattr("llama_mimi.audio.mimi.MimiCodec.encode_many", lambda *_: [])  # all clips are in the cache
    again = encode(codec, clips, tmp_path)
    assert again[0] == ids and all(np.array_equal(again[1][i].codes_TQ, codes[i].codes_TQ) for i in ids)
    _, deep = encode(codec.at_depth(8), clips, tmp_path)  # the cache also serves a model with more levels
    assert all(deep[i].codes_TQ.shape[1] == 8 for i in ids)
    assert all(np.array_equal(deep[i].codes_TQ[:, :4], codes[i].codes_TQ) for i in ids)
    shard = next(tmp_path.rglob("*.parquet"))
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(UserError, match=shard.name):
        encode(codec, clips, tmp_path)


def test_codes_made_with_other_settings_are_kept_apart(tmp_path, codec):
    clips = some_clips("sample_1[0-3]_0.ogg")
    ids, plain = encode(codec, clips, tmp_path)
    for max_seconds, as_released in ((1.0, False), (20.0, True)):
        _, other = encode(codec, clips, tmp_path, max_seconds, as_released=as_released)
        assert any(not np.array_equal(plain[i].codes_TQ, other[i].codes_TQ) for i in ids)
    assert len(list(tmp_path.iterdir())) == 3
    # The presets differ only in the partial last frame.
    assert all(np.array_equal(plain[i].codes_TQ[:-1], other[i].codes_TQ[:-1]) for i in ids)


def test_a_clip_that_cannot_be_used_stops_the_run(tmp_path, codec):
    speech(tmp_path, "short.wav", 0.05)
    (tmp_path / "nothing.wav").touch()
    for name, message in (("nothing.wav", r"is empty \(0 bytes\)"), ("short.wav", "less than one codec frame")):
        with pytest.raises(AudioError, match=f"{tmp_path / name}.*{message}"):
            encode(codec, clips_of(TINY / "prompt.wav", tmp_path / name), tmp_path / "codes")


def test_pairs_touched_by_the_cut_and_ties_are_counted(tmp_path, codec, model):
    """Two recordings that are equal up to 20 s are a tie, even in a batch with other clips."""
    long, exact, other = (speech(tmp_path, f"{s}.wav", s) for s in (22.0, 20.0, 19.5))
    samples = read_audio(long, 24_000).samples_S.numpy()
    samples[20 * 24_000 + 100 :] *= 0.5
    soundfile.write(tmp_path / "other_end.wav", samples, 24_000)
    clips = clips_of(long, exact, long, tmp_path / "other_end.wav", other)
    ids, codes = encode(codec, clips, tmp_path / "codes")
    cut = [(codes[i].is_cut, len(codes[i].codes_TQ)) for i in ids]
    assert ids[2] != ids[3] and cut == [(True, 250), (False, 250), (True, 250), (True, 250), (False, 244)]
    pairs = [Pair("a", "0", "0", clips[0], clips[1]), Pair("a", "1", "1", clips[2], clips[3])]
    by_id = score(model, codes, Scoring(None), tmp_path / "log", 2100)
    coded, scores = [codes[i] for i in ids], [{"primary": by_id[i]} for i in ids]
    nones = [None] * len(ids)
    report = results(Benchmark(pairs), coded, nones, scores, Scoring(None), SALMON_PARTS)
    assert (report["parts"]["a"]["pairs_cut"], report["parts"]["a"]["ties"]) == (2, 1)
    assert report["pairs"][1]["correct"] == 0.5 and report["mean_of_parts"] is None
    strict = results(Benchmark(pairs), coded, nones, scores, Scoring(None, as_released=True), ())
    assert strict["pairs"][1]["correct"] == 0.0 and strict["pairs"][1]["is_tie"]


# Scoring


@pytest.fixture(scope="module")
def encoded(tmp_path_factory, codec):
    """Return the ids of the clips of 40 SALMon pairs, and codes by id."""
    return encode(codec, read_salmon(str(SALMON)).clips[:80], tmp_path_factory.mktemp("codes"))


@pytest.mark.parametrize("as_released", [False, True])
@pytest.mark.parametrize("levels", [None, (0,)])
def test_batches_score_as_clips_alone_do(tmp_path, encoded, model, as_released, levels):
    """Scores agree within 1e-4, and all decisions are equal."""
    ids, codes = encoded
    scoring = Scoring(levels, as_released)
    batched = score(model, codes, scoring, tmp_path / "log")
    clips = {i: (torch.from_numpy(clip.codes_TQ.astype("int64")), clip.is_cut) for i, clip in codes.items()}
    alone = {i: batch_scores(model, [clip], scoring, [0])[0]["primary"] for i, clip in clips.items()}
    assert batched == pytest.approx(alone, abs=1e-4)
    for positive, negative in zip(ids[::2], ids[1::2], strict=True):
        assert (batched[positive] > batched[negative]) == (alone[positive] > alone[negative])


@pytest.mark.parametrize("levels", [None, (0,)])
def test_preset_original_is_the_release_from_file_to_score(tmp_path, model, levels):
    """Compare with a plain loop in stock `transformers`: single clips, codes as text, full logits, labels."""
    codec = MimiCodec(str(TINY / "mimi"), 4, sliding_window=False)
    clips = some_clips()[:4]
    ids, codes = encode(codec, clips, tmp_path, as_released=True)
    scores = score(model, codes, Scoring(levels, as_released=True), tmp_path / "log")
    model.decoder.config.update({"num_quantizers": 4})
    expected = [
        score_alone(clip.source.read_bytes(), model.decoder, model.tokenizer.text_tokenizer, codec.model, levels)
        for clip in clips
    ]
    assert [scores[i] for i in ids] == pytest.approx(expected, abs=1e-5)


def test_other_audio_never_gets_the_scores_of_a_run_that_was_killed(tmp_path, codec, model):
    """A score depends on the codes and on whether the clip is cut, and not on the clip's name."""
    codes_TQ = codec.encode([read_audio(TINY / "prompt.wav", 24_000).samples_S])[0].numpy()
    clip, *others = (CodedClip("", np.roll(codes_TQ, shift, axis=0), 0.0, False) for shift in range(4))
    before = {"a": clip, **{f"x{i}": other for i, other in enumerate(others)}}
    expected = score(model, before, Scoring(None), tmp_path / "log")
    renamed = {"z": clip, "cut": replace(clip, is_cut=True), **{f"a{i}": other for i, other in enumerate(others)}}
    scores = score(model, renamed, Scoring(None), tmp_path / "log")
    assert scores["z"] == expected["a"] and [scores[f"a{i}"] for i in range(3)] == [expected[f"x{i}"] for i in range(3)]
    assert scores["cut"] != scores["z"]
    # The first release also adds </audio> to a cut clip.
    scores = score(model, renamed, Scoring(None, as_released=True), tmp_path / "log2")
    assert scores["cut"] == scores["z"]


def test_a_score_that_is_not_finite_is_refused(tmp_path, codec, model):
    broken = copy.deepcopy(model.decoder)
    broken.model.norm.weight.data[0] = float("inf")
    codes = {"a": CodedClip("a", np.zeros((3, 4), np.uint16), 0.0, False)}
    with pytest.raises(UserError, match="overflows in float32"):
        score(FlattenedModel(broken, model.tokenizer, codec), codes, Scoring(None), tmp_path)


# The scripts


def command(model_folder, output_dir, data_dir=SALMON, *flags, script="eval/salmon.py"):
    common = ["--model_name", model_folder, "--data_dir", data_dir, "--output_dir", output_dir, *flags]
    return [ROOT / script, *common]


@pytest.fixture(scope="module")
def some_pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "salmon" / "speaker_consistency"
    folder.mkdir(parents=True)
    for path in (SALMON / "speaker_consistency").glob("sample_[1-4]?_*.ogg"):
        shutil.copy(path, folder)
    return folder.parent


def report_of(output_dir, name="official"):
    return json.loads((output_dir / "salmon" / "random" / f"{name}.json").read_text())


@pytest.mark.slow
def test_ranks_and_kills_give_the_same_file(model_folder, some_pairs, tmp_path):
    flags = ("--batch_tokens", "1000")  # about 12 clips
    run_ranks(1, command(model_folder, tmp_path / "one", some_pairs, *flags), tmp_path / "log")
    expected = (tmp_path / "one" / "salmon" / "random" / "official.json").read_bytes()

    run_ranks(2, command(model_folder, tmp_path / "two", some_pairs, *flags), tmp_path / "log")
    assert (tmp_path / "two" / "salmon" / "random" / "official.json").read_bytes() == expected

    # Kill after the first shard of codes, again after some batches of scores, and resume on two ranks.
    folder = tmp_path / "killed"
    partial = folder / "salmon" / "random" / "official.partial"
    words = command(model_folder, folder, some_pairs, *flags)
    shards = (folder / "codes").rglob
    kill_when(words, lambda: list(shards("shard-*.parquet")), tmp_path / "log")
    assert len(list(shards("shard-*.parquet"))) == 1 and not partial.exists()  # of two shards
    logs = partial.rglob
    kill_when(words, lambda: sum(log.read_text().count("\n") for log in logs("*.jsonl")) > 25, tmp_path / "log")
    assert partial.exists() and not partial.with_name("official.json").exists()
    assert "clips were already finished" in run_ranks(2, words, tmp_path / "log")
    assert partial.with_name("official.json").read_bytes() == expected and not partial.exists()


def kill_when(parts, is_time, log):
    """Start a script and kill it with SIGKILL as soon as ``is_time()`` is true."""
    ranks = ForkedRanks(1, parts, log)
    deadline = time.monotonic() + 120
    try:
        while not is_time():
            assert ranks.is_running() and time.monotonic() < deadline, ranks.output
            time.sleep(0.001)
    finally:
        ranks.kill()


def test_another_run_does_not_replace_a_result(tmp_path):
    path = tmp_path / "official.json"
    codec, settings = {"sha256": "c", "sliding_window": True}, {"dtype": "float32", "max_audio_seconds": 20.0}
    header = {"format": FORMAT, "model": "m", "model_sha256": "a" * 64, "data": "one"}
    header |= {"codec": codec, "settings": settings}
    check_earlier(path, header)
    path.write_text(json.dumps(header))
    check_earlier(path, header | {"model_sha256": "b" * 64})  # new weights
    for change, message in (
        ({"data": "two"}, "was made with data = 'one', but the current value is 'two'; choose another --output_dir"),
        ({"codec": codec | {"sliding_window": False}}, "codec.sliding_window = True"),
    ):
        with pytest.raises(UserError, match=message):
            check_earlier(path, header | change)


def test_result_files_explain_themselves(model_folder, some_pairs, tmp_path):
    flags = ("--levels", "0,1", "--likelihood", "grammar")
    said = run_ranks(1, command(model_folder, tmp_path, some_pairs, *flags), tmp_path / "log")
    report = report_of(tmp_path, "official-levels_0_1-grammar")
    assert report["preset"] == "official-levels_0_1-grammar" and report["scoring"]["likelihood"] == "grammar"
    assert report["format"] == FORMAT and report["data_kind"] == "other"  # the copy lacks the file SYNTHETIC
    assert {"torch", "transformers", "commit"} <= report["versions"].keys() and report["settings"]["dtype"] == "float32"
    hashes = report["codes_sha256"], report["model_sha256"], report["codec"]["sha256"], report["audio_sha256"]
    assert [len(one) for one in hashes] == [64] * 4
    part = report["parts"]["speaker_consistency"]
    assert part["count"] == 40 == len(report["pairs"]) and part["interval"][0] < part["accuracy"] < part["interval"][1]
    right = sum(pair["positive_score"] > pair["negative_score"] for pair in report["pairs"])
    assert part["accuracy"] == (right + part["ties"] / 2) / 40 and "mean over parts" not in said
    assert report["mean_of_parts"] is None
    assert list(report["rules"]) == ["level_0", "all_levels", "after_prompt", "normalised"]
    for pair in report["pairs"]:
        files = [some_pairs / "speaker_consistency" / pair[name] for name in ("positive", "negative")]
        shortest = min(math.ceil(soundfile.info(file).frames / 1920) for file in files)  # a frame has 1,920 samples
        assert 10 < pair["prompt_frames"] < shortest
    table = read_results([tmp_path])
    for rule, found in report["rules"].items():
        some = [pair["rules"][rule] for pair in report["pairs"]]
        right = sum(one["positive_score"] > one["negative_score"] for one in some)
        accuracy = (right + sum(one["is_tie"] for one in some) / 2) / 40
        assert found["parts"]["speaker_consistency"]["accuracy"] == accuracy
        assert table["value"][table["measure"] == f"salmon/speaker_consistency:{rule}"].mean() == accuracy
        assert f"rule {rule.replace('_', ' ')}: speaker_consistency: {100 * accuracy:.1f} %" in said

    run_ranks(1, command(model_folder, tmp_path, some_pairs, *flags, "--limit", "7"), tmp_path / "log")
    quick = report_of(tmp_path, "official-levels_0_1-grammar-limit_7")
    assert quick["notes"] == ["--limit 7: 7 of 40 pairs were scored"] and len(quick["pairs"]) == 7
    whole = {pair["name"]: pair["positive_score"] for pair in report["pairs"]}  # computed in other batches
    assert all(pair["positive_score"] == pytest.approx(whole[pair["name"]], abs=1e-5) for pair in quick["pairs"])

    run_ranks(1, command(model_folder, tmp_path, some_pairs, "--preset", "original"), tmp_path / "log")
    original = report_of(tmp_path, "original")
    assert original["scoring"]["as_released"] and original["codes_sha256"] != report["codes_sha256"]
    assert original["rules"] == {} and "prompt_frames" not in original["pairs"][0]


def test_rules_have_headings_below_the_row_of_their_benchmark():
    names = [
        "sLM21/lexical_dev:text",
        "similarity",
        "salmon/mean:normalised",
        "sLM21/lexical_dev:all_levels",
        "salmon/mean:level_0",
    ]
    names += ["sLM21/lexical_dev", "salmon/mean", "salmon/mean:after_prompt", "bits/4"]
    assert [measure_of(name).heading for name in in_order(names)] == [
        "validation bits/s, Q = 4",
        "SALMon mean",
        "SALMon mean, level 0",
        "SALMon mean, after prompt",
        "SALMon mean, normalised",
        "sWUGGY",
        "sWUGGY, all levels",
        "sWUGGY, text",
        "speaker similarity",
    ]
    assert measure_of("salmon/mean:level_0").text(0.5) == "50.0"


def test_a_limit_draws_a_part_of_what_a_larger_one_draws():
    clip = Clip("x", TINY / "prompt.wav")
    places = itertools.product(("lexical", "syntactic"), range(9), range(3))
    pairs = [Pair(part, f"{word}-{voice}", f"word{word}", clip, clip) for part, word, voice in places]
    whole = Benchmark(pairs, unpaired=[clip])
    few, more = limited(whole, 2), limited(whole, 5)
    assert len(few.pairs) == 2 * 2 * 3 and all(pair in more.pairs for pair in few.pairs) and few.unpaired == []
    assert more.pairs == [pair for pair in pairs if pair in more.pairs]  # in the original order
    assert limited(whole, 99).pairs == pairs


def test_slm21_writes_the_official_submission(model_folder, tmp_path):
    data = tmp_path / "sLM21"
    for task in ("lexical", "syntactic"):
        source, folder = TINY / "benchmarks" / "sLM21" / task / "dev", data / task / "dev"
        folder.mkdir(parents=True)
        header, *rows = (source / "gold.csv").read_text().splitlines()[:9]
        (folder / "gold.csv").write_text("\n".join([header, *rows]) + "\n")
        for row in rows:
            shutil.copy(source / f"{row.split(',')[header.split(',').index('filename')]}.ogg", folder)
    (data / "lexical" / "test").mkdir()
    shutil.copy(TINY / "prompt.wav", data / "lexical" / "test" / "xyz.wav")
    folder = shutil.copytree(model_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tasks": ["audio", "text"]}))
    run_ranks(1, command(folder, tmp_path / "results", data, script="eval/sLM21.py"), tmp_path / "log")
    folder = tmp_path / "results" / "sLM21" / "model"
    report = json.loads((folder / "official.json").read_text())
    files = [
        folder / "official_submission" / f"{split}.txt" for split in ("lexical/dev", "lexical/test", "syntactic/dev")
    ]
    scores = dict(line.split(" ") for file in files for line in file.read_text().splitlines())
    assert "xyz" in scores and len(scores) == 17 and report["unpaired_clips"] == 1
    for pair, side in itertools.product(report["pairs"], ("positive", "negative")):
        assert float(scores[pair[side].removesuffix(".ogg")]) == pair[f"{side}_score"]
    assert report["parts"]["syntactic_dev"]["by"]["type"]["word_order"]["count"] == 4
    assert report["scoring"]["levels"] == [0] and list(report["rules"]) == ["all_levels", "text"]
    assert not any("transcript" in note for note in report["notes"])  # the unpaired clip is not counted
    assert report["rules"]["all_levels"]["parts"]["syntactic_dev"]["by"]["type"]["word_order"]["count"] == 4


def test_stories_are_also_scored_as_text(model_folder, tmp_path):
    """The decisions on texts change if the transcripts are swapped. Pairs without a transcript are counted."""
    name, data, source = "random", tmp_path / "storycloze", TINY / "benchmarks" / "storycloze"
    folder = shutil.copytree(model_folder, tmp_path / name)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tasks": ["audio", "interleaved", "text"]}))
    data.mkdir()
    header, *rows = (source / "transcripts.csv").read_text().splitlines()[:7]
    for row in rows:
        shutil.copy(source / row.split(",")[0], data)

    def evaluate(rows):
        (data / "transcripts.csv").write_text("\n".join([header, *rows]) + "\n")
        said = run_ranks(1, command(folder, tmp_path / "results", data, script="eval/sStoryCloze.py"), tmp_path / "log")
        report = json.loads((tmp_path / "results" / "sStoryCloze" / name / "official.json").read_text())
        rules = {rule: [pair["rules"].get(rule) for pair in report["pairs"]] for rule in report["rules"]}
        return said, report["notes"], {rule: [pair and pair["correct"] for pair in of] for rule, of in rules.items()}

    said, notes, correct = evaluate(rows)
    assert list(correct) == ["all_levels", "text", "text_prompt", "text_ending"] and notes == []
    assert "rule text ending: storycloze: " in said
    table = read_results([tmp_path / "results"])
    assert table["value"][table["measure"] == "sStoryCloze/storycloze:text_ending"].tolist() == correct["text_ending"]
    files, texts = zip(*(row.split(",", 1) for row in rows), strict=True)
    swapped = [f"{file},{texts[number ^ 1]}" for number, file in enumerate(files)]
    unknown = swapped[4].rsplit(",", 1)[0] + ","  # the time of the ending in the first clip of the last pair
    _, notes, other = evaluate([*swapped[:4], unknown, swapped[5]])
    assert other["text"] == [1 - value for value in correct["text"]]
    assert other["text_ending"] == [*(1 - value for value in correct["text_ending"][:2]), None]
    assert other["text_prompt"] == [*correct["text_prompt"][:2], None]  # the endings are spoken
    lacking = "1 of 6 clips lack a transcript, or the time of the ending (see eval/README.md)"
    assert notes == [f"rule text prompt: {lacking}", f"rule text ending: {lacking}"]
    table = read_results([tmp_path / "results"])
    assert table["value"][table["measure"] == "sStoryCloze/storycloze:text_ending"].count() == 2
    (folder / "config.json").write_text(json.dumps(config | {"tasks": ["interleaved"]}))  # does not predict EOS
    assert list(evaluate(rows)[2]) == ["all_levels", "text_prompt", "text_ending"]
    (folder / "config.json").write_text(json.dumps(config | {"tasks": ["asr", "text"]}))
    code, stderr = run_here(*command(folder, tmp_path, data, script="eval/sStoryCloze.py"))
    assert code == 1 and "needs the task 'audio' or 'tts' or 'interleaved', but the model was trained on asr" in stderr


def test_mistakes_get_one_sentence(model_folder, some_pairs, tmp_path):
    for flags, message in (
        (("--max_audio_seconds", "0.01"), "less than one codec frame"),
        (("--levels", "9"), "level 9, but the model has levels 0 to 3"),
        (("--output_dir", "README.md"), "'README.md"),
    ):
        code, stderr = run_here(*command(model_folder, tmp_path, some_pairs, *flags))
        assert code == 1 and message in stderr and stderr.count("error: ") == 1
