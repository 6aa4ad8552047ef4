"""Error rates of transcripts and of spoken texts: values, recordings with voice prompts, and both commands."""

import hashlib
import json
import shutil
from pathlib import Path

import jiwer
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TINY, run_here
from forked_ranks import run_ranks
from test_judged_prompts import audio_row, corpus
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

from llama_mimi.audio.reading import read_audio
from llama_mimi.common.errors import UserError
from llama_mimi.evaluation.statistics import crossed_interval
from llama_mimi.generation.continuation import finished, for_model
from llama_mimi.generation.decoding import FinishReason, Request, decode
from llama_mimi.generation.loading import load_speech_model
from llama_mimi.generation.options import SamplingOptions
from llama_mimi.generation.transcription import transcribe
from llama_mimi.judging.error_rates import add_error_rates
from llama_mimi.judging.options import PROMPTS, RECORDINGS, PromptOptions, TextOptions, VoiceOptions
from llama_mimi.judging.prompts import Prompt, PromptSet, make_prompts
from llama_mimi.report.estimates import by_measure, estimate, same_items
from llama_mimi.report.results import measure_of, read_results

VALIDATION = str(TINY / "corpus" / "validation-*.parquet")
RECOGNISER = str(TINY / "recogniser")


def test_mean_rates_are_the_rates_of_the_whole_corpus():
    """Compare with jiwer on all texts together. The texts have 4, 2, 3 and 1 words after normalisation."""
    texts = ["Mister Quilter, don't!", "twenty-one cats", "the the the", "Hello"]
    found = ["mr quilter do", "", "The cat", "hello there you"]
    prompts = PromptSet(Path(), "", tuple(Prompt(str(n), "", 0.0, text) for n, text in enumerate(texts)))
    records = [{"prompt": str(number)} | ({"text": text} if text else {}) for number, text in enumerate(found)]
    add_error_rates(records, prompts, None, "asr")
    normalised, heard = (list(map(EnglishTextNormalizer({}), some)) for some in (texts, found))
    assert normalised == ["mister quilter do not", "21 cats", "the the the", "hello"]
    assert np.mean([record["asr/wer"] for record in records]) == pytest.approx(100 * jiwer.wer(normalised, heard))
    assert np.mean([record["asr/cer"] for record in records]) == pytest.approx(100 * jiwer.cer(normalised, heard))
    assert [record["word_errors"]["errors"] for record in records] == [1, 2, 2, 2]
    order = sorted(range(4), key=lambda number: hashlib.sha256(str(number).encode()).digest())
    shuffled = [normalised[order[(order.index(number) + 1) % 4]] for number in range(4)]
    assert np.mean([r["asr/wer_shuffled"] for r in records]) == pytest.approx(100 * jiwer.wer(shuffled, heard))
    assert all(r["asr/wer_gain"] == pytest.approx(r["asr/wer_shuffled"] - r["asr/wer"]) for r in records)


def test_other_languages_keep_their_words():
    """The normaliser for English removes "um", which is a German word."""
    prompts = PromptSet(Path(), "", (Prompt("a", "", 0.0, "Er bittet um Äpfel!"),))
    for language, expected in (("de", 25.0), ("en", 0.0)):
        records = [{"prompt": "a", "text": "er bittet äpfel"}]
        add_error_rates(records, prompts, language, "asr")
        assert records[0]["asr/wer"] == expected
    add_error_rates(records := [{"prompt": "a", "text": "er bittet um äpfel"}], prompts, "de", "asr")
    assert records[0]["asr/cer"] == 0  # the basic normaliser replaces the exclamation mark by a space


def test_recordings_begin_with_the_voice_prompt_of_the_same_speaker(tmp_path):
    rows = [(0, 2.0, "a"), (1, 3.3, "a"), (2, 2.94, "a"), (3, 4.0, "b"), (4, 1.0, None), (5, 9.0, "a"), (6, 2.0, "b")]
    rows = [audio_row(number, seconds, id=f"{number}", speaker=s, text=f"text {number}") for number, seconds, s in rows]
    rows[6]["text"] = None
    path = corpus(tmp_path / "c.parquet", rows)
    prompts = make_prompts(tmp_path / "with", VoiceOptions(corpus=path), 5.0)
    plain = make_prompts(tmp_path / "without", TextOptions(corpus=path), 5.0)
    skipped = json.loads((tmp_path / "with" / "prompts.json").read_text())["skipped"]
    assert skipped == {"too long": 1, "no text": 1}
    found = {prompt.name: (prompt.text, prompt.prompt_text, prompt.seconds) for prompt in prompts.prompts}
    assert found == {
        "0": ("text 0", "text 2", 2.96),  # 37 frames; 2.94 is nearest to 3 s
        "1": ("text 1", "text 2", 2.96),
        "2": ("text 2", "text 1", 3.36),
        "3": ("text 3", "", 0.0),  # the other recording of the speaker has no text
        "4": ("text 4", "", 0.0),
    }
    for prompt, other in zip(prompts.prompts, plain.prompts, strict=True):
        whole_S, utterance_S = (
            read_audio(of.file(RECORDINGS, one), None).samples_S for of, one in ((prompts, prompt), (plain, other))
        )
        start = round(prompt.seconds * 16_000)
        assert torch.equal(whole_S[start:], utterance_S) and (other.text, other.seconds) == (prompt.text, 0.0)
        assert prompts.file(PROMPTS, prompt).exists() == (start > 0)
        if start:
            voice_S = read_audio(prompts.file(PROMPTS, prompt), None).samples_S
            assert torch.equal(voice_S, whole_S[:start])
            voice = next(one for one in plain.prompts if one.text == prompt.prompt_text)
            recorded_S = read_audio(plain.file(RECORDINGS, voice), None).samples_S
            assert torch.equal(voice_S[: len(recorded_S)], recorded_S) and not voice_S[len(recorded_S) :].any()
    with pytest.raises(UserError, match="max_seconds = 5.0, but the current value is 6.0; choose another --output_dir"):
        make_prompts(tmp_path / "with", VoiceOptions(corpus=path), 6.0)
    for options, was in ((TextOptions(corpus=path), "3.0"), (VoiceOptions(corpus=path, voice_seconds=0), "3.0")):
        with pytest.raises(UserError, match=f"voice_seconds = {was}, but"):
            make_prompts(tmp_path / "with", options, 5.0)
    with pytest.raises(UserError, match="text_column = 'text', but the current value is None; choose another"):
        make_prompts(tmp_path / "with", PromptOptions(corpus=path))
    shortest = make_prompts(tmp_path / "short", VoiceOptions(corpus=path, voice_seconds=1.5), 5.0)
    assert [prompt.prompt_text for prompt in shortest.prompts[:3]] == ["text 2", "text 0", "text 0"]
    with pytest.raises(UserError, match="lacks a readable recording of 0.4 to 0.9 s; add recordings of this length"):
        make_prompts(tmp_path / "none", TextOptions(corpus=path), 0.9)


def asr_command(output_dir, *more, model=RECOGNISER):
    return "eval/asr.py", "--model_name", model, "--corpus", VALIDATION, "--output_dir", output_dir, *more


@pytest.fixture(scope="module")
def transcribed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results") / "asr"
    code, stderr = run_here(*asr_command(folder))
    assert code == 0, stderr
    return folder


def test_the_tiny_recogniser_has_its_known_error_rate(transcribed):
    """The rate is in assets/tiny/recogniser/README.md. The interval is that of a plain call, over speakers."""
    result = json.loads((transcribed / "recogniser.json").read_text())
    samples, (_, measure, rows) = result["samples"], next(by_measure(read_results([transcribed]), ["measure"]))
    assert len(samples) == 47 and result["data_kind"] == "synthetic" and rows["measure"].iloc[0] == "asr/wer"
    errors = [sample["word_errors"]["errors"] for sample in samples]
    words = [sample["word_errors"]["words"] for sample in samples]
    found = estimate(same_items(rows)[0], measure)
    speakers = [sample["speaker"] for sample in samples]
    expected = crossed_interval([100 * np.array(errors) / np.mean(words)], clusters_N=speakers)
    assert found.interval[:3] == pytest.approx(expected[:3]) and round(found.interval.mean, 1) == 19.4
    assert all(sample["asr/wer_gain"] > 0 for sample in samples)


def test_the_interval_of_an_error_rate_begins_at_zero():
    index = pd.MultiIndex.from_tuples([("", name, name) for name in "abcde"], names=["part", "item", "cluster"])
    values = pd.DataFrame({"system": [0.0, 0.0, 0.0, 0.0, 400.0]}, index=index)
    rate, gain = (estimate(values, measure_of(f"tts/{name}")).interval for name in ("wer", "wer_gain"))
    assert gain.low < 0 == rate.low and rate.high == gain.high > 100


def test_two_ranks_and_a_kill_change_no_transcript(transcribed, tmp_path):
    again = Path(shutil.copytree(transcribed, tmp_path / "asr"))
    before = (again / "recogniser.json").read_bytes()
    (log,) = (again / "measured" / "transcripts").glob("*/*.jsonl")
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:20]) + '{"half a l')
    (again / "recogniser.json").unlink()
    run_ranks(2, asr_command(again), tmp_path / "log")
    assert (again / "recogniser.json").read_bytes() == before
    new = [len(path.read_text().splitlines()) for path in log.parent.glob("*.jsonl") if path != log]
    assert sorted(new) == [11, 16]  # 27 of 47 recordings are transcribed again, in batches of 16


@pytest.fixture(scope="module")
def speaking(model_folder, tmp_path_factory):
    """A random model of the tasks "asr" and "tts"."""
    folder = tmp_path_factory.mktemp("models") / "speaking"
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tasks": ["asr", "tts"]}))
    return folder


def test_a_speech_language_model_transcribes(speaking, model_folder, tmp_path):
    """Compare with `transcribe`, which tests/test_transcription.py compares with a plain loop."""
    flags = ("--limit", 3, "--batch_size", 2)
    code, stderr = run_here(*asr_command(tmp_path, *flags, model=speaking))
    assert code == 0, stderr
    result, model = json.loads((tmp_path / "speaking.json").read_text()), load_speech_model(str(speaking))
    for sample in result["samples"]:
        codes = model.codec.encode([read_audio(tmp_path / sample["file"], 24_000).samples_S])
        ((text, is_cut),) = transcribe(model, codes, 1)
        assert (sample["text"], sample["ended"]) == (text, float(not is_cut))
        assert sample["word_errors"]["errors"] >= sample["word_errors"]["words"] > 0
    assert len(result["samples"]) == 3 and result["made_by"]["recogniser"]["codec_sha256"]
    config = json.loads((model_folder / "config.json").read_text()) | {"tasks": ["audio"]}
    audio_only = shutil.copytree(model_folder, tmp_path / "models" / "audio_only")
    (audio_only / "config.json").write_text(json.dumps(config))
    code, stderr = run_here(*asr_command(tmp_path / "new", *flags, model=audio_only))
    assert code == 1 and "eval/asr.py needs the task 'asr', but the model was trained on audio" in stderr


def test_wrong_flags_of_asr_are_refused(transcribed, tmp_path):
    for flags, message in (
        (("--limit", 0), "--limit is 0; set it to 1 or more"),
        (("--name", "recordings"), "--name 'recordings' is reserved"),
        (("--text_column", "words"), "lacks the column 'words' for the text"),
    ):
        code, stderr = run_here(*asr_command(tmp_path / "new", *flags))
        assert code == 1 and message in stderr and "Traceback" not in stderr
    folder = shutil.copytree(transcribed, tmp_path / "asr")
    code, stderr = run_here(*asr_command(folder, "--language", "de"))
    assert code == 1 and "language = None, but the current value is 'de'; choose another --name" in stderr
    assert (folder / "recogniser.json").read_bytes() == (transcribed / "recogniser.json").read_bytes()


def tts_command(model, output_dir, *more):
    words = ("eval/tts.py", "--model_name", model, "--corpus", VALIDATION, "--limit", 4, "--output_dir", output_dir)
    words += ("--voice_seconds", 2.6, "--seconds", 5, "--quality", "none")
    words += ("--asr_model", RECOGNISER, "--speaker_model", TINY / "speaker_encoder", "--batch_size", 2)
    return *words, *more


@pytest.fixture(scope="module")
def spoken(speaking, tmp_path_factory):
    """Results of a command. Two of the four recordings are by one speaker, and the others lack a voice prompt."""
    folder = tmp_path_factory.mktemp("results") / "tts"
    code, stderr = run_here(*tts_command(speaking, folder))
    assert code == 0, stderr
    return folder


def results(folder):
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json") if path.name != "prompts.json"}


def test_texts_are_spoken_with_the_voice_prompt(spoken, speaking):
    """Compare with single calls of `decode`, and with the rest of the recordings."""
    found, prompts = results(spoken), json.loads((spoken / "prompts.json").read_text())["prompts"]
    assert found.keys() == {"speaking", "recording", "shuffled", "reconstruction_q4"}
    model, lengths = load_speech_model(str(speaking)), []
    of_prompt = {sample["prompt"]: sample for sample in found["speaking"]["samples"]}
    records = map(json.loads, (spoken / "speaking" / "results.jsonl").read_text().splitlines())
    seeds = {Path(record["prompt"]).stem: record["seed"] for record in records}
    for prompt in prompts:
        prompt_TQ = torch.zeros(0, 4, dtype=torch.long)
        if prompt["seconds"]:
            voice_S = read_audio(spoken / "prompts" / f"{prompt['name']}.wav", 24_000).samples_S
            (prompt_TQ,) = model.codec.encode([voice_S])
        text = f"{prompt['prompt_text']} {prompt['text']}".strip()
        sampling = for_model(SamplingOptions(seconds=5), model)
        drawn = decode(model, [Request(prompt_TQ, seeds[prompt["name"]], text)], sampling, 1)
        ((_, new_TQ, end, _),) = finished(drawn, 4)
        sample = of_prompt[prompt["name"]]
        expected_S = model.codec.decode(torch.cat([prompt_TQ, new_TQ])).clamp(-1, 1)
        assert torch.allclose(read_audio(spoken / sample["file"], None).samples_S, expected_S, atol=1e-3)
        assert sample["ended"] == (end == FinishReason.EOS)
        assert (sample["similarity"] is None) == (prompt["seconds"] == 0)
        assert sample["missing"].get("similarity") == (None if prompt["seconds"] else "no voice prompt")
        assert sample["reference"] == prompt["text"] and sample.get("prompt_text", "") in ("", prompt["prompt_text"])
        lengths.append(prompt["seconds"])
    assert sorted(map(bool, lengths)) == [False, False, True, True]
    rate = {name: np.mean([sample["tts/wer"] for sample in result["samples"]]) for name, result in found.items()}
    assert rate["recording"] < rate["reconstruction_q4"] < rate["shuffled"] and rate["speaking"] > 80
    assert rate["recording"] < 40 and all(
        s["similarity"] > 0.5 for s in found["recording"]["samples"] if s["similarity"]
    )


def test_two_ranks_and_a_kill_change_no_speech(spoken, speaking, tmp_path):
    again = Path(shutil.copytree(spoken, tmp_path / "tts"))
    (again / "speaking" / "results.jsonl").unlink()
    shutil.rmtree(again / "measured" / "transcripts")
    run_ranks(2, tts_command(speaking, again), tmp_path / "log")
    for name, expected in results(spoken).items():
        found = results(again)[name]
        for sample, other in zip(found["samples"], expected["samples"], strict=True):
            sample.pop("real_time_factor", None), other.pop("real_time_factor", None)
        assert found["samples"] == expected["samples"]


def test_wrong_use_of_tts_is_refused(speaking, model_folder, tmp_path):
    script, *words = tts_command(speaking, tmp_path / "new")
    place = words.index("--asr_model")
    code, stderr = run_here(script, *words[:place], *words[place + 2 :])
    assert code == 1 and "--asr_model is missing; set --asr_model" in stderr
