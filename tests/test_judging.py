"""Measures (compared with plain computations), replies of judges, and the whole command."""

import itertools
import json
import shutil
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import distillmos
import httpx
import numpy as np
import openai
import pytest
import soundfile
import torch
import transformers
from conftest import ROOT, TINY, next_command, run_here
from forked_ranks import run_ranks
from hypothesis import given
from hypothesis import strategies as st
from transformers.convert_slow_tokenizer import bytes_to_unicode

from llama_mimi.audio.reading import read_audio
from llama_mimi.common.distributed import DistributedContext
from llama_mimi.common.errors import UserError
from llama_mimi.evaluation.results import FORMAT
from llama_mimi.generation.options import SamplingOptions
from llama_mimi.judging import judge as judge_module
from llama_mimi.judging import metrics
from llama_mimi.judging.judge import judge
from llama_mimi.judging.metrics import Measure, compute
from llama_mimi.judging.options import (
    PROMPTS,
    RECORDINGS,
    GenerationOptions,
    MeasureOptions,
    PromptOptions,
    read_criteria,
)
from llama_mimi.judging.prompts import make_prompts
from llama_mimi.judging.script import measure_samples
from llama_mimi.judging.systems import Clip, wavs
from llama_mimi.report.results import read_results

CPU = torch.device("cpu")
SPEAKER, RECOGNISER = str(TINY / "speaker_encoder"), str(TINY / "recogniser")
CRITERIA = ROOT / "eval" / "judge.toml"
VALIDATION = str(TINY / "corpus" / "validation-*.parquet")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    options = PromptOptions(corpus=VALIDATION, prompt_seconds=1.6, recording_seconds=2.6, limit=3)
    return make_prompts(tmp_path_factory.mktemp("judged"), options)


@pytest.fixture(scope="module")
def clips(prompts):
    return [Clip(prompts.file(RECORDINGS, prompt), prompt.seconds) for prompt in prompts.prompts]


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("language_model")
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(TINY / "llama").save_pretrained(folder)
    return str(folder)


# Measures.


def values(measure, inputs):
    return list(measure.compute(inputs))


def features(samples_S):
    return ((samples_S - samples_S.mean()) / (samples_S.var(unbiased=False) + 1e-7).sqrt())[None]


@torch.inference_mode()
def test_similarity_is_the_cosine_of_two_x_vectors(prompts, clips):
    model = transformers.WavLMForXVector.from_pretrained(SPEAKER).eval()
    pairs = [(Clip(prompts.file(PROMPTS, prompt)), clip) for prompt, clip in zip(prompts.prompts, clips, strict=True)]
    length = sorted(len(clip.read(16_000).samples_S) for clip in clips)[1]  # one of the three clips is shorter
    measure = metrics.speaker_similarity(SPEAKER, length / 16_000, CPU)
    assert measure.keys == ("similarity", f"similarity/{length / 16_000:g}")
    missing = 0
    for pair, found in zip(pairs, values(measure, pairs), strict=True):
        prompt_S, whole_S = (clip.read(16_000).samples_S for clip in pair)
        vectors = [model(features(some_S)).embeddings[0] for some_S in (prompt_S, whole_S, whole_S[:length])]
        whole, start = (float(torch.cosine_similarity(vectors[0], vector, dim=0)) for vector in vectors[1:])
        assert found["similarity"] == pytest.approx(whole, abs=1e-5)
        if len(whole_S) < length:
            missing += found[measure.keys[1]] is None
        else:
            assert found[measure.keys[1]] == pytest.approx(start, abs=1e-5)
    assert missing == 1


def test_the_fixed_length_fits_prompts_recordings_and_continuations():
    def fixed(seconds=10.0, **prompts):
        sampling = SamplingOptions(seconds=seconds)
        return GenerationOptions(prompts=PromptOptions(corpus="x", **prompts), model_name="m", sampling=sampling)

    assert fixed().similarity_seconds == 3.0  # the length of a prompt
    assert fixed(prompt_seconds=1.6, recording_seconds=2.6).similarity_seconds == 1.0  # the rest of a recording
    assert fixed(seconds=0.8).similarity_seconds == 0.8


@torch.inference_mode()
def test_transcripts_are_greedy_paths(clips):
    model = transformers.Wav2Vec2ForCTC.from_pretrained(RECOGNISER).eval()
    tokenizer = transformers.Wav2Vec2CTCTokenizer.from_pretrained(RECOGNISER)
    measure = metrics.transcripts(RECOGNISER, None, CPU, batch_size=3)
    for clip, found in zip(clips, values(measure, [(clip,) for clip in clips]), strict=True):
        ids = model(features(clip.read(16_000).samples_S)).logits[0].argmax(-1)
        assert found["text"] == tokenizer.decode(ids) != ""


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    """Write a Whisper model with random weights and a small vocabulary; return its folder."""
    folder = tmp_path_factory.mktemp("whisper")
    end, start, english = "<|endoftext|>", "<|startoftranscript|>", "<|en|>"
    special = [end, start, english, "<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>"]
    special += ["<|nospeech|>", "<|notimestamps|>", *(f"<|{step / 50:.2f}|>" for step in range(1501))]
    letters = sorted(bytes_to_unicode().values())
    tokenizer = transformers.WhisperTokenizer({letter: n for n, letter in enumerate(letters)}, [], pad_token=end)
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.save_pretrained(folder)
    transformers.WhisperFeatureExtractor(feature_size=8).save_pretrained(folder)
    of = {name: tokenizer.convert_tokens_to_ids(name) for name in special}
    torch.manual_seed(0)
    sizes = {"d_model": 16, "num_mel_bins": 8, "vocab_size": len(tokenizer), "max_target_positions": 32}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_ffn_dim": 16, f"{part}_layers": 1, f"{part}_attention_heads": 2}
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), of[end])
    ids["decoder_start_token_id"] = of[start]
    model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**sizes, **ids))
    model.generation_config = transformers.GenerationConfig(
        **ids,
        is_multilingual=True,
        lang_to_id={english: of[english]},
        task_to_id={"transcribe": of["<|transcribe|>"], "translate": of["<|translate|>"]},
        no_timestamps_token_id=of["<|notimestamps|>"],
        max_length=32,
        suppress_tokens=[],
        begin_suppress_tokens=[],
    )
    model.save_pretrained(folder)
    return str(folder)


def test_whisper_transcribes_a_clip_alone_as_in_a_batch(whisper, clips):
    found = [values(metrics.transcripts(whisper, "en", CPU, size), [(clip,) for clip in clips]) for size in (1, 3)]
    assert found[0] == found[1]


@torch.inference_mode()
def test_distillmos_is_the_packages(clips):
    expected = distillmos.ConvTransformerSQAModel().eval()(clips[0].read(16_000).samples_S[None])
    assert values(metrics.distillmos(CPU), [clips[:1]]) == [{"distillmos": pytest.approx(float(expected), abs=1e-4)}]


@torch.inference_mode()
def test_perplexity_of_the_continuation_given_the_prompt_and_of_both(language_model):
    pairs = [("the baker", "buttered a pudding"), ("", "a"), ("in the forest the camper", "sat")]
    model = transformers.LlamaForCausalLM.from_pretrained(language_model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(language_model)
    found = values(metrics.perplexity(language_model, CPU), pairs)
    for (prompt, continuation), value in zip(pairs, found, strict=True):
        context, new = (tokenizer.encode(text, add_special_tokens=False) for text in (prompt, f" {continuation}"))
        ids, losses = [tokenizer.bos_token_id], []
        for token in context + new:
            losses.append(-float(model(torch.tensor([ids])).logits[0, -1].log_softmax(0)[token]))
            ids.append(token)
        assert value["log_perplexity"] == pytest.approx(np.mean(losses[len(context) :]), abs=1e-5)
        assert value["log_generative_perplexity"] == pytest.approx(np.mean(losses), abs=1e-5)


@given(st.lists(st.sampled_from("abc"), max_size=12))
def test_auto_bleu_is_the_fraction_of_bigrams_that_occur_again(words):
    """Compare with a plain loop: a bigram counts if it is among the other bigrams."""
    bigrams = [" ".join(words[start : start + 2]) for start in range(len(words) - 1)]
    repeated = [bigram in bigrams[:place] + bigrams[place + 1 :] for place, bigram in enumerate(bigrams)]
    assert metrics.auto_bleu(words) == (sum(repeated) / len(bigrams) if bigrams else 0)


def test_pauses_are_counted(tmp_path):
    samples = np.sin(np.arange(32_000) / 5) * 0.5
    samples[8_000:16_000] = 0
    samples[20_000:22_000] = 0  # 0.125 s is too short for a pause
    soundfile.write(tmp_path / "a.wav", samples, 16_000)
    (found,) = values(metrics.pauses(), [(Clip(tmp_path / "a.wav"),)])
    assert found == {"seconds": 2.0, "silent": pytest.approx(0.25, abs=0.011)}


def test_aesthetics_come_from_the_package_if_it_is_installed(clips, monkeypatch):
    with pytest.raises(UserError, match="needs the package audiobox_aesthetics; install audiobox-aesthetics"):
        metrics.aesthetics(2)

    def forward(batch):
        return [{"CE": 1.0, "PQ": float(one["path"].shape[1])} for one in batch if one["sample_rate"] == 16_000]

    fake = SimpleNamespace(initialize_predictor=lambda: SimpleNamespace(forward=forward))
    monkeypatch.setitem(sys.modules, "audiobox_aesthetics", SimpleNamespace(infer=fake))
    monkeypatch.setitem(sys.modules, "audiobox_aesthetics.infer", fake)
    monkeypatch.setattr(metrics, "version", lambda package: "1")
    found = values(metrics.aesthetics(2), [(clip,) for clip in clips])
    assert [one["aesthetics/PQ"] for one in found] == [len(clip.read(16_000).samples_S) for clip in clips]


def test_words_have_no_punctuation():
    words = metrics.words_of(' The BAKER\'s  bun, "sweet"... [10.5] don\u2019t')
    assert words == ["the", "baker's", "bun", "sweet", "10.5", "don\u2019t"] and metrics.words_of(" . -") == []


def test_a_value_is_computed_once_and_a_failure_again(tmp_path):
    computed = []

    def inverse(batch):
        for (number,) in batch:
            computed.append(number)
            yield {"x": float("nan")} if number == 0 else {"x": 1 / number}

    def measured(version, *inputs):
        computed.clear()
        measure = Measure("m", ("x",), {"version": version}, inverse, 2)
        return compute(measure, [(x,) for x in inputs], tmp_path, DistributedContext()), computed

    assert measured(1, 0, 1, 2, 2) == (["not finite", {"x": 1.0}, {"x": 0.5}, {"x": 0.5}], [0, 1, 2])
    assert measured(1, 2, 0, 4) == ([{"x": 0.5}, "not finite", {"x": 0.25}], [0, 4])
    assert measured(2, 1) == ([{"x": 1.0}], [1])


# The judge.


@pytest.fixture
def serve(monkeypatch):
    """Return a function that starts a server; ``answer`` maps a request and its number to status and text."""
    client_class = openai.OpenAI

    def start(answer):
        server, numbers = SimpleNamespace(answer=answer, requests=[], url="http://judge/v1"), itertools.count()

        def handle(request):
            number, content = next(numbers), json.loads(request.content)
            server.requests.append(content)
            status, text = server.answer(content, number)
            if text == "<html>":
                return httpx.Response(status, html=text)
            reply = {"object": "chat.completion", "id": "x", "created": 0, "model": content["model"]}
            message = {"role": "assistant", "content": text}
            reply["choices"] = [{"index": 0, "finish_reason": "stop", "message": message}]
            content = reply if status == 200 else {"error": {"message": text}}
            return httpx.Response(status, json=content, headers={"Retry-After": "0.01"})

        client = httpx.Client(transport=httpx.MockTransport(handle))
        monkeypatch.setattr(openai, "OpenAI", partial(client_class, http_client=client))
        return server

    return start


PAIRS = [(f"the {number}", "goes on") for number in range(4)]
GOOD = '{"content": 4}'
WRONG = "the reply does not end with a JSON object with the keys content"
NUMBER = "a score is not a whole number from 1 to 5"


def judged(server, folder, pairs=PAIRS):
    return compute(judge(server.url, "m", read_criteria(CRITERIA)), pairs, folder, DistributedContext())


def late(request, number):
    if number == 0:
        raise httpx.ReadTimeout("late")
    return 200, GOOD


@pytest.mark.parametrize(
    ("answer", "expected", "calls"),
    [
        (lambda r, n: (200, 'I think:\n```json\n{"content": 4.0}\n```'), 4, 4),
        (lambda r, n: (200, '<think>{a} {"content": 1}</think> [{"content": 4}]'), 4, 4),
        # Invalid replies.
        (lambda r, n: (200, None), WRONG, 4),
        (lambda r, n: (200, "<html>"), "'str' object has no attribute 'choices'", 4),
        (lambda r, n: (200, '{"content": 4, "style": 3}'), WRONG, 4),
        (lambda r, n: (200, '{"content": 6}'), NUMBER, 4),
        # Endless replies.
        (lambda r, n: (200, '{"a":' + "[" * 100_000 + "}"), "nested too deeply", 4),
        (lambda r, n: (200, "{" * 1_000_000 + GOOD), 4, 4),
        # The client retries.
        (lambda r, n: (429, "slow down") if n < 3 else (200, GOOD), 4, 7),
        (late, 4, 5),
        # The server refuses.
        (lambda r, n: (401, "who are you"), "does not answer .*401.*who are you.*earlier replies are saved", None),
    ],
)
def test_replies_of_a_judge(tmp_path, serve, answer, expected, calls):
    server = serve(answer)
    if calls is None:
        with pytest.raises(UserError, match=expected):
            judged(server, tmp_path)
        return
    found = judged(server, tmp_path)
    assert found == [expected if isinstance(expected, str) else {"judge/content": expected}] * 4
    assert len(server.requests) == calls
    assert judged(server, tmp_path) == found  # only failed requests are repeated
    assert len(server.requests) == calls + (calls if isinstance(expected, str) else 0)


def test_each_reply_stays_with_its_question_and_is_kept(tmp_path, serve, monkeypatch):
    """Replies arrive in another order than requests. The server fails at the last request, and works again later."""
    monkeypatch.setattr(judge_module, "RETRIES", 0)

    def by_number(request, number):
        n = int(request["messages"][1]["content"].split("the ")[1][0])
        time.sleep(0.1 * (2 - n) if n < 3 else 0.5)
        return (200, json.dumps({"content": n + 1})) if n < 3 else (500, "gone")

    server = serve(by_number)
    with pytest.raises(UserError, match=f"the judge 'm' at {server.url} does not answer .*500"):
        judged(server, tmp_path)
    server.answer = lambda request, number: (200, GOOD)
    assert [value["judge/content"] for value in judged(server, tmp_path)] == [1, 2, 3, 4]
    request = server.requests[0]
    assert len(server.requests) == 5 and request["temperature"] == 0 and request["model"] == "m"
    assert request["response_format"]["json_schema"]["schema"]["required"] == ["content"]
    assert "goes on" in request["messages"][1]["content"] and "Is the continuation" in request["messages"][0]["content"]


def test_a_file_without_criteria_is_refused(tmp_path):
    for field, message in (("other", "KeyError"), ("prompt", "the request lacks {prompt} or {continuation}")):
        (tmp_path / "judge.toml").write_text(f"system = 'a'\nrequest = '{{{field}}}'\n[criteria]\na = 'b'")
        with pytest.raises(UserError, match=f"is not a criteria file .*{message}"):
            read_criteria(tmp_path / "judge.toml")


# All measures.


def test_every_measure_of_every_sample(prompts, tmp_path, language_model, serve):
    for prompt, kind in zip(prompts.prompts, ("speech", "nothing", "silence"), strict=True):
        speech = read_audio(prompts.file(RECORDINGS, prompt), 16_000).samples_S.numpy()
        samples = {"speech": speech, "nothing": speech[:10], "silence": np.zeros(16_000)}[kind]
        soundfile.write(tmp_path / f"{prompt.name}.wav", samples, 16_000)
    samples = wavs(prompts, tmp_path, contain_prompt=False, max_seconds=2.0)
    options = {"speaker_model": SPEAKER, "asr_model": RECOGNISER, "quality": "none", "text_model": language_model}
    server = serve(lambda r, n: (200, GOOD))
    chosen = MeasureOptions(**options, judge_model="m", judge_url=server.url)
    fixed = 60.0  # longer than each sample
    found, descriptions = measure_samples(samples, prompts, chosen, fixed, DistributedContext())
    assert len(server.requests) == 1
    by_prompt = {record["prompt"]: record for record in found}
    speech, nothing, silence = (by_prompt[prompt.name] for prompt in prompts.prompts)
    assert speech["missing"] == {"similarity/60": "too short"} and speech["similarity/60"] is None
    assert speech["auto_bleu"] == metrics.auto_bleu(metrics.words_of(speech["text"]))
    assert speech["judge/content"] == 4 and 0 < speech["log_perplexity"] < 20
    assert speech["words_per_minute"] == 60 * len(metrics.words_of(speech["text"])) / speech["seconds"] > 30
    assert speech["prompt_text"] and speech["prompt_text"] != speech["text"]
    assert nothing["missing"] == {"sound": "too short"} and nothing["similarity"] is nothing["judge/content"] is None
    assert nothing["words_per_minute"] is nothing["auto_bleu"] is silence["auto_bleu"] is None
    assert [by_prompt[prompt.name]["speaker"] for prompt in prompts.prompts] == [p.speaker for p in prompts.prompts]
    assert silence["missing"] == {"words": "no words", "similarity/60": "too short"}
    assert silence["judge/content"] is None
    assert silence["words_per_minute"] == 0 and silence["silent"] == 1.0
    assert set(descriptions) == {"pauses", "similarity", "transcripts", "perplexity", "judge"}


# The command.


def command(model, output_dir, *more):
    words = ("eval/generation.py", "--model_name", model, "--corpus", VALIDATION, "--prompt_seconds", 1.6)
    words += ("--recording_seconds", 2.6, "--seconds", 0.8, "--min_seconds", 0.8, "--limit", 3, "--num_samples", 2)
    words += ("--speaker_model", SPEAKER, "--asr_model", RECOGNISER, "--quality", "none", "--batch_size", 2)
    return *words, "--output_dir", output_dir, *more


def result_files(folder):
    return {path.name: json.loads(path.read_text()) for path in folder.glob("*.json") if path.name != "prompts.json"}


@pytest.fixture(scope="module")
def generated(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("table") / "generation"
    code, stderr = run_here(*command(model_folder, folder))
    assert code == 0, stderr
    return folder


def test_one_command_from_prompts_to_results(generated, model_folder, tmp_path, capsys):
    results = result_files(generated)
    own = model_folder.name
    counts = {name.removesuffix(".json"): len(result["samples"]) for name, result in results.items()}
    assert counts == {own: 6, "recording": 3, "shuffled": 3, "reconstruction_q4": 3}
    for first, second in itertools.pairwise(results.values()):
        assert all(first[key] == second[key] for key in ("prompts_sha256", "measures", "seconds"))
        assert first["format"] == FORMAT and first["kind"] == "generations" and first["data_kind"] == "synthetic"
    assert results[f"{own}.json"]["made_by"]["model_sha256"] and results["recording.json"]["made_by"] is None
    sample = results[f"{own}.json"]["samples"][1]
    assert (generated / sample["file"]).is_file() and -1 <= sample["similarity"] <= 1
    assert {"prompt", "sample", "missing", "text", "prompt_text", "seconds", "ended", "similarity/0.8"} <= sample.keys()
    items = read_results([generated])
    fixed = items[(items["system"] == own) & (items["measure"] == "similarity/0.8")]
    listed = json.loads((generated / "prompts.json").read_text())["prompts"]
    speakers = {prompt["name"]: prompt["speaker"] for prompt in listed}
    assert fixed["value"].notna().all() and dict(zip(fixed["item"], fixed["cluster"], strict=True)) == speakers
    assert set(items["conditions"].str.split(", measures").str[0]) == {"0.8 s, speaker encoder speaker_encoder"}
    before = {path: path.read_bytes() for path in generated.rglob("*.json*")}
    assert run_here(*command(model_folder, generated))[0] == 0  # a repeated command computes nothing
    assert next_command(capsys.readouterr().out).endswith(f"--results {generated} --output_file {generated}/report.md")
    assert {path: path.read_bytes() for path in generated.rglob("*.json*")} == before

    folder = Path(shutil.copytree(generated, tmp_path / "more"))
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for path in (folder / own).glob("*_0.wav"):
        shutil.copy(path, theirs)
    script, _, _, *flags = command(model_folder, folder, "--wavs", theirs)
    code, stderr = run_here(script, *flags)
    assert code == 0, stderr
    assert json.loads((folder / "theirs.json").read_text())["made_by"] == {"wavs": str(theirs)}
    code, stderr = run_here(script, *flags, "--wavs", shutil.copytree(theirs, tmp_path / "other" / "theirs"))
    assert code == 1 and "theirs.json' was made with wavs = " in stderr and "choose another --name" in stderr


def test_two_ranks_and_a_kill_change_nothing(generated, model_folder, tmp_path):
    again = Path(shutil.copytree(generated, tmp_path / "generation"))
    # Imitate a kill: samples, a reconstruction and values are missing. Two ranks resume.
    (again / model_folder.name / "results.jsonl").unlink()
    next((again / "reconstruction_q4").glob("*.wav")).unlink()
    shutil.rmtree(again / "measured" / "transcripts")
    (log,) = (again / "measured" / "similarity").glob("*/*.jsonl")
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:4]) + '{"half a l')
    run_ranks(2, command(model_folder, again), tmp_path / "log")
    for name, expected in result_files(generated).items():
        found = json.loads((again / name).read_text())
        for sample, other in zip(found["samples"], expected["samples"], strict=True):
            sample.pop("real_time_factor", None), other.pop("real_time_factor", None)
        assert found["samples"] == expected["samples"] and found["audio_sha256"] == expected["audio_sha256"]


def test_mistakes_get_one_sentence(model_folder, generated):
    for flags, message in (
        (("--wavs", "x"), "set either --model_name or --wavs"),
        (("--name", "recording"), "--name 'recording' is reserved"),
        (("--judge_url", "x"), "--judge_url needs --judge_model; set --judge_model"),
        (("--listening_batch_size", 0), "--listening_batch_size is 0; set it to 1 or more"),
        (("--speaker_model", "nowhere"), "the speaker model folder 'nowhere' does not exist"),
    ):
        code, stderr = run_here(*command(model_folder, generated, *flags))
        assert code == 1 and message in stderr and "Traceback" not in stderr
