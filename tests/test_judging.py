"""Measures against a plain recomputation, a judge of any mood, and one command from prompts to a table."""

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import distillmos
import numpy as np
import pytest
import report
import soundfile
import torch
from conftest import ROOT, TINY, run_here
from forked_ranks import run_ranks
from test_report import cells
from transformers import (
    AutoFeatureExtractor,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2ForCTC,
    WavLMForXVector,
    WavLMModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from llama_mimi.audio.reading import read_audio
from llama_mimi.common.errors import UserError
from llama_mimi.common.ranks import Ranks
from llama_mimi.judging import judge as judge_module
from llama_mimi.judging import sound
from llama_mimi.judging.judge import Judge, read_criteria
from llama_mimi.judging.listening import Listener, MeasureOptions
from llama_mimi.judging.measures import FAILED, take
from llama_mimi.judging.prompts import PromptOptions, make_prompts
from llama_mimi.judging.script import GenerationOptions, judge_generations
from llama_mimi.judging.sound import Aesthetics, DistillMos, Pair, Pauses, SpeakerSimilarity
from llama_mimi.judging.systems import Clip, recordings, wavs
from llama_mimi.judging.words import Perplexity, TextPair, Transcripts, words_of

CPU = torch.device("cpu")
SPEAKER, RECOGNISER = str(TINY / "speaker_encoder"), str(TINY / "recogniser")
CRITERIA = ROOT / "eval" / "judge.toml"
VALIDATION = str(TINY / "corpus" / "validation-*.parquet")
OPTIONS = PromptOptions(corpus=VALIDATION, prompt_seconds=1.6, recording_seconds=2.6, limit=3)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return make_prompts(tmp_path_factory.mktemp("judged"), OPTIONS)


@pytest.fixture(scope="module")
def clips(prompts):
    return [sample.clip for sample in recordings(prompts, 2.0)]


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("language_model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY / "llama").save_pretrained(folder)
    return str(folder)


# Each measure, by the plainest use of its model.


def features(samples_S):
    return ((samples_S - samples_S.mean()) / (samples_S.var(unbiased=False) + 1e-7).sqrt())[None]


@torch.inference_mode()
def test_similarity_is_the_cosine_of_two_x_vectors(prompts, clips):
    model = WavLMForXVector.from_pretrained(SPEAKER).eval()
    pairs = [Pair(Clip(prompts.path(prompt)), clip) for prompt, clip in zip(prompts.prompts, clips, strict=True)]
    found = dict(SpeakerSimilarity(SPEAKER, CPU).values(pairs))
    for place, pair in enumerate(pairs):
        vectors = [model(features(clip.read(16_000).samples_S)).embeddings[0] for clip in pair]
        assert found[place] == pytest.approx(float(torch.cosine_similarity(*vectors, dim=0)), abs=1e-5)


@torch.inference_mode()
def test_transcripts_are_greedy_paths(clips):
    model, tokenizer = (
        Wav2Vec2ForCTC.from_pretrained(RECOGNISER).eval(),
        Wav2Vec2CTCTokenizer.from_pretrained(RECOGNISER),
    )
    found = dict(Transcripts(RECOGNISER, None, CPU, batch_size=3).values(clips))
    for place, clip in enumerate(clips):
        ids = model(features(clip.read(16_000).samples_S)).logits[0].argmax(-1)
        assert found[place] == tokenizer.decode(ids) != ""


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    """Whisper's classes with random weights and a few letters."""
    folder = tmp_path_factory.mktemp("whisper")
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|de|>", "<|translate|>", "<|transcribe|>"]
    special += ["<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
    special += [f"<|{step / 50:.2f}|>" for step in range(1501)]
    letters = sorted(bytes_to_unicode().values())
    tokenizer = WhisperTokenizer({letter: n for n, letter in enumerate(letters)}, [], pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=8).save_pretrained(folder)
    of = {name: tokenizer.convert_tokens_to_ids(name) for name in special}
    torch.manual_seed(0)
    sizes = {
        "d_model": 16,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
        "num_mel_bins": 8,
        "vocab_size": len(tokenizer),
    }
    layers = dict.fromkeys(("encoder_layers", "decoder_layers"), 1)
    heads = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    end, start = of["<|endoftext|>"], of["<|startoftranscript|>"]
    ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "decoder_start_token_id": start}
    model = WhisperForConditionalGeneration(WhisperConfig(**sizes, **layers, **heads, **ids, max_target_positions=32))
    model.generation_config = GenerationConfig(
        **ids,
        is_multilingual=True,
        lang_to_id={"<|en|>": of["<|en|>"], "<|de|>": of["<|de|>"]},
        task_to_id={"transcribe": of["<|transcribe|>"], "translate": of["<|translate|>"]},
        no_timestamps_token_id=of["<|notimestamps|>"],
        max_length=32,
        suppress_tokens=[],
        begin_suppress_tokens=[],
    )
    model.save_pretrained(folder)
    return str(folder)


def test_whisper_hears_alone_what_it_hears_in_a_batch(whisper, clips):
    together = dict(Transcripts(whisper, "en", CPU, batch_size=3).values(clips))
    alone = [dict(Transcripts(whisper, "en", CPU, batch_size=1).values([clip]))[0] for clip in clips]
    assert [together[place] for place in range(3)] == alone
    with pytest.raises(UserError, match="--language is 'xx', which .* cannot be told"):
        Transcripts(whisper, "xx", CPU, batch_size=1)


@torch.inference_mode()
def test_distillmos_is_the_packages_alone_and_in_a_batch(clips, tmp_path):
    samples = np.concatenate([clip.read(16_000).samples_S for clip in clips * 3])
    soundfile.write(tmp_path / "long.wav", samples[: 8 * 16_000], 16_000)  # two windows
    every = [*clips[:2], Clip(tmp_path / "long.wav")]
    found = dict(DistillMos(CPU, batch_size=2).values(every))
    model = distillmos.ConvTransformerSQAModel().eval()
    for place, clip in enumerate(every):
        assert found[place] == pytest.approx(float(model(clip.read(16_000).samples_S[None])), abs=1e-4)


@torch.inference_mode()
def test_perplexity_is_of_the_continuation_given_the_prompt(language_model):
    pairs = [
        TextPair("the baker", "buttered a pudding"),
        TextPair("", "a"),
        TextPair("in the forest the camper", "sat"),
    ]
    found = dict(Perplexity(language_model, CPU, batch_size=2).values(pairs))
    model, tokenizer = LlamaForCausalLM.from_pretrained(language_model), AutoTokenizer.from_pretrained(language_model)
    for place, (prompt, continuation) in enumerate(pairs):
        ids = [tokenizer.bos_token_id, *tokenizer.encode(prompt, add_special_tokens=False)]
        losses = []
        for token in tokenizer.encode(f" {continuation}", add_special_tokens=False):
            losses.append(-float(model(torch.tensor([ids])).logits[0, -1].log_softmax(0)[token]))
            ids.append(token)
        assert found[place] == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def test_pauses_are_counted(tmp_path):
    samples = np.sin(np.arange(32_000) / 5) * 0.5
    samples[8_000:16_000] = 0
    samples[20_000:22_000] = 0  # an eighth of a second belongs to speech
    soundfile.write(tmp_path / "a.wav", samples, 16_000)
    ((_, found),) = Pauses().values([Clip(tmp_path / "a.wav")])
    assert found == {"seconds": 2.0, "silent": pytest.approx(0.25, abs=0.011)}


def test_aesthetics_are_asked_of_the_package_where_it_is(clips, monkeypatch):
    with pytest.raises(UserError, match="needs the package audiobox-aesthetics .* which is not installed"):
        Aesthetics(2)
    asked: list[int] = []

    def forward(batch):
        asked.append(len(batch))
        return [{"CE": 1.0, "PQ": float(one["path"].shape[1])} for one in batch if one["sample_rate"] == 16_000]

    fake = SimpleNamespace(initialize_predictor=lambda: SimpleNamespace(forward=forward))
    monkeypatch.setitem(__import__("sys").modules, "audiobox_aesthetics", SimpleNamespace(infer=fake))
    monkeypatch.setitem(__import__("sys").modules, "audiobox_aesthetics.infer", fake)
    found = dict(Aesthetics(2).values(clips))
    assert asked == [2, 1]
    assert [found[n]["PQ"] for n in range(3)] == [len(clip.read(16_000).samples_S) for clip in clips]


def test_words_have_no_marks():
    said = words_of(' The BAKER\'s  bun, "sweet"... [10.5] don\u2019t')
    assert said == ["the", "baker's", "bun", "sweet", "10.5", "don\u2019t"] and words_of(" . -") == []


def test_a_value_is_measured_once(clips, tmp_path, monkeypatch):
    by_key = {clip.key: clip for clip in clips}
    values, stage = take(Pauses(), by_key, tmp_path, Ranks())
    assert stage.inputs == 3 and list(values) == list(by_key)
    monkeypatch.setattr(Pauses, "values", None)
    assert take(Pauses(), by_key, tmp_path, Ranks()) == (
        values,
        replace(stage, inputs=0, seconds=pytest.approx(0, abs=1)),
    )
    monkeypatch.setattr(sound, "PAUSE_SECONDS", 0.5)  # another measure: nothing of it is known
    with pytest.raises(TypeError):
        take(Pauses(), by_key, tmp_path, Ranks())


# A judge that speaks the protocol.


class Server(ThreadingHTTPServer):
    """Answers by a function of the request and the number of requests before it: a status and a text, or None."""

    daemon_threads = True

    def __init__(self, answer: Callable[[dict, int], tuple[int, str]]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.requests = answer, []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.requests)
            self.server.requests.append(request)
        status, text = self.server.answer(request, number)
        reply = {"object": "chat.completion", "id": "x", "created": 0, "model": request["model"]}
        reply["choices"] = [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}]
        content = (
            json.dumps(reply if status == 200 else {"error": {"message": text}}) if text != "<html>" else text
        ).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json" if text != "<html>" else "text/html")
            self.send_header("Content-Length", str(len(content)))
            if status == 429:
                self.send_header("Retry-After", "0.01")
            self.end_headers()
            self.wfile.write(content)
        except OSError:
            pass  # the client has given up

    def log_message(self, *args):
        pass


@contextmanager
def serving(answer) -> Iterator[Server]:
    server = Server(answer)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


PAIRS = {str(n): TextPair(f"the {n}", "goes on") for n in range(4)}
GOOD = '{"content": 4}'


def late(request, number):
    if number == 0:
        time.sleep(1.5)
    return 200, GOOD


@pytest.mark.parametrize(
    ("answer", "expected", "calls"),
    [
        (lambda r, n: (200, GOOD), {"content": 4}, 4),
        (lambda r, n: (200, 'I think:\n```json\n{"content": 4}\n```'), {"content": 4}, 4),
        (lambda r, n: (200, '{"content": 4.0}'), {"content": 4}, 4),
        # Bad at first, well when asked again.
        (lambda r, n: (200, GOOD if len(r["messages"]) > 2 else "four"), {"content": 4}, 8),
        # Bad for ever: three times each, then counted by what is wrong with it.
        (lambda r, n: (200, "four"), f"{FAILED}no JSON", 12),
        (lambda r, n: (200, ""), f"{FAILED}no JSON", 12),
        (lambda r, n: (200, '{"content": 4, "style": 3}'), f"{FAILED}wrong number of scores", 12),
        (lambda r, n: (200, "{}"), f"{FAILED}wrong number of scores", 12),
        (lambda r, n: (200, '{"contents": 4}'), f"{FAILED}scores of other criteria", 12),
        (lambda r, n: (200, '<think>{a} {"content": 1}</think> {"content": 4}'), {"content": 4}, 4),
        (lambda r, n: (200, None), f"{FAILED}no JSON", 12),
        (lambda r, n: (200, '[{"content": 4}]'), {"content": 4}, 4),
        (lambda r, n: (200, '{"content": 6}'), f"{FAILED}score is out of range", 12),
        (lambda r, n: (200, '{"content": "4"}'), f"{FAILED}score is no whole number", 12),
        (lambda r, n: (200, '{"content": true}'), f"{FAILED}score is no whole number", 12),
        (lambda r, n: (200, '{"content": 3.5}'), f"{FAILED}score is no whole number", 12),
        (lambda r, n: (200, '{"content": NaN}'), f"{FAILED}score is no whole number", 12),
        (lambda r, n: (200, "<html>"), f"{FAILED}no JSON", 12),
        # A model that has lost its way.
        (lambda r, n: (200, '{"a":' * 100_000), f"{FAILED}no JSON", 12),
        (lambda r, n: (200, '{"a":' + "[" * 100_000 + "}"), f"{FAILED}no JSON", 12),
        (lambda r, n: (200, "{" * 1_000_000 + GOOD), {"content": 4}, 4),
        # What passes: the client tries again.
        (lambda r, n: (429, "slow down") if n < 3 else (200, GOOD), {"content": 4}, 7),
        (lambda r, n: (503, "busy") if n < 2 else (200, GOOD), {"content": 4}, 6),
        (late, {"content": 4}, 5),
        # What does not.
        (lambda r, n: (401, "who are you"), "refuses with status 401 .*who are you", None),
        (lambda r, n: (404, "no such model"), "the judge 'm' refuses with status 404", None),
        (lambda r, n: (429, "never"), "refuses with status 429 .*what it has replied is kept", None),
    ],
)
def test_a_judge_of_any_mood(tmp_path, monkeypatch, answer, expected, calls):
    monkeypatch.setattr(judge_module, "RETRIES", 3)
    with serving(answer) as server:
        judge = Judge(server.url, "m", read_criteria(CRITERIA), parallel=2, timeout_seconds=1.0)
        if calls is None:
            with pytest.raises(UserError, match=expected):
                take(judge, PAIRS, tmp_path, Ranks())
            return
        values, stage = take(judge, PAIRS, tmp_path, Ranks())
        assert values == dict.fromkeys(PAIRS, expected) and len(server.requests) == calls and stage.inputs == 4
        again, _ = take(judge, PAIRS, tmp_path, Ranks())  # scores are known now, and failures tried again
        assert again == values and len(server.requests) == calls + (calls if isinstance(expected, str) else 0)


def test_each_reply_stays_with_its_question(tmp_path):
    """However late: replies come in another order than questions."""

    def by_length(request, number):
        n = int(request["messages"][1]["content"].split("the ")[1][0])
        time.sleep(0.05 * (3 - n))
        return 200, json.dumps({"content": n + 1})

    with serving(by_length) as server:
        judge = Judge(server.url, "m", read_criteria(CRITERIA), parallel=4, timeout_seconds=5)
        values, _ = take(judge, PAIRS, tmp_path, Ranks())
    assert [values[str(n)]["content"] for n in range(4)] == [1, 2, 3, 4]
    request = server.requests[0]
    assert request["temperature"] == 0 and request["model"] == "m"
    assert request["response_format"]["json_schema"]["schema"]["required"] == ["content"]
    assert "goes on" in request["messages"][1]["content"] and "Is the continuation" in request["messages"][0]["content"]


def test_replies_are_kept_when_the_server_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(judge_module, "RETRIES", 0)
    with serving(lambda r, n: (200, GOOD) if n < 2 else (500, "gone")) as server:
        judge = Judge(server.url, "m", read_criteria(CRITERIA), parallel=1, timeout_seconds=5)
        with pytest.raises(UserError, match="status 500"):
            take(judge, PAIRS, tmp_path, Ranks())
        server.answer, before = (lambda r, n: (200, GOOD)), len(server.requests)
        values, stage = take(judge, PAIRS, tmp_path, Ranks())
    assert len(values) == 4 and stage.inputs == 2 == len(server.requests) - before
    judge = Judge(server.url, "m", read_criteria(CRITERIA), parallel=1, timeout_seconds=5)
    with pytest.raises(UserError, match=f"the judge at {server.url} cannot be reached or is too slow"):
        take(judge, {"new": TextPair("a", "b")}, tmp_path, Ranks())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no file of criteria"),
        ("system = 1 = 2", "is no file of criteria"),
        ("system = 'a'\nrequest = 'b'", "is no file of criteria \\(KeyError"),
        ("system = 'a'\nrequest = '{prompt} {other}'\n[criteria]\na = 'b'", "is no file of criteria \\(KeyError"),
        ("system = 'a'\nrequest = '{prompt}'\n[criteria]\na = 'b'", "lacks criteria, or its request the fields"),
        ("system = 'a'\nrequest = '{prompt} {continuation}'\n[criteria]\n", "lacks criteria"),
    ],
)
def test_criteria_that_are_none(tmp_path, content, message):
    if content is not None:
        (tmp_path / "judge.toml").write_text(content)
    with pytest.raises(UserError, match=message):
        read_criteria(tmp_path / "judge.toml")


# All measures together.


def test_every_measure_of_every_sample(prompts, tmp_path, language_model, capsys):
    folder = tmp_path / "theirs"
    folder.mkdir()
    for prompt, kind in zip(prompts.prompts, ("speech", "nothing", "silence"), strict=True):
        speech = read_audio(prompts.recording_path(prompt), 16_000).samples_S.numpy()
        samples = {"speech": speech, "nothing": speech[:10], "silence": np.zeros(16_000)}[kind]
        soundfile.write(folder / f"{prompt.name}.wav", samples, 16_000)
    samples = wavs(prompts, folder, hold_prompt=False, max_seconds=2.0)
    options = {"speaker_model": SPEAKER, "asr_model": RECOGNISER, "quality": "none", "text_model": language_model}
    with serving(lambda r, n: (200, GOOD)) as server:
        options |= {"judge_model": "m", "judge_url": server.url}
        dry = Listener(MeasureOptions(**options, dry_run=True), prompts, tmp_path, Ranks())
        dry.records(samples)
        said = capsys.readouterr().out
        assert not server.requests and "1 such calls; 0 replies are known already" in said
        assert "--- system\nYou judge" in said and "--- user\nBeginning: " in said
        listener = Listener(MeasureOptions(**options), prompts, tmp_path, Ranks())
        records = {record["prompt"]: record for record in listener.records(samples)}
        assert len(server.requests) == 1
    speech, nothing, silence = (records[prompt.name] for prompt in prompts.prompts)
    assert speech["missing"] == {} and speech["judge/content"] == 4 and 0 < speech["log_perplexity"] < 20
    assert speech["words_per_minute"] == 60 * len(words_of(speech["text"])) / speech["seconds"] > 30
    assert speech["prompt_text"] and speech["prompt_text"] != speech["text"]
    assert nothing["missing"] == {"sound": "too short"} and nothing["similarity"] is nothing["judge/content"] is None
    assert nothing["words_per_minute"] is None
    assert silence["missing"] == {"words": "no words"} and silence["judge/content"] is None
    assert silence["words_per_minute"] == 0 and silence["silent"] == 1.0
    assert set(listener.described) == {"pauses", "similarity", "transcripts", "log_perplexity", "judge"}
    assert listener.stages["transcripts"].inputs == 0  # heard in the dry run


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"text_model": "a"}, "name an --asr_model, too"),
        ({"asr_model": "a", "judge_url": "b"}, "name its --judge_model"),
        ({"listening_batch_size": 0}, "--listening_batch_size is 0"),
        ({"asr_model": "a", "judge_model": "b", "judge_parallel": 0}, "--judge_parallel is 0"),
        ({"asr_model": "a", "judge_model": "b", "judge_criteria": Path("no.toml")}, "'no.toml' is no file of criteria"),
    ],
)
def test_flags_of_measures_that_do_not_go_together(flags, message):
    with pytest.raises(UserError, match=message):
        MeasureOptions(**flags)


def test_openai_is_not_asked_without_a_key(monkeypatch):
    """Said before anything is made, but not where flags are only read."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    measures = MeasureOptions(asr_model="a", judge_model="b")
    with pytest.raises(UserError, match="set OPENAI_API_KEY, or name a --judge_url"):
        judge_generations(GenerationOptions(prompts=PromptOptions(corpus="x"), model_name="m", measures=measures))
    for more in ({"judge_url": "http://localhost"}, {"dry_run": True}):
        MeasureOptions(asr_model="a", judge_model="b", **more).check_key()


def test_a_language_is_for_those_that_are_told_one():
    with pytest.raises(UserError, match="--language is 'en', which .* cannot be told; leave it out"):
        Transcripts(RECOGNISER, "en", CPU, 1)


def test_a_model_of_another_kind_is_refused(tmp_path):
    """Its head would be random, and another one at each start."""
    WavLMModel(WavLMForXVector.from_pretrained(SPEAKER).config).save_pretrained(tmp_path)
    AutoFeatureExtractor.from_pretrained(SPEAKER).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is not a whole speaker model: .* the WavLMForXVector .*missing, first 'class"):
        SpeakerSimilarity(str(tmp_path), CPU)


def test_a_value_that_is_no_number_is_a_failure(tmp_path):
    class Broken:
        name = "broken"

        def describe(self):
            return {}

        def values(self, inputs):
            yield from enumerate([float("nan"), 1.0])

    assert take(Broken(), {"a": 0, "b": 0}, tmp_path, Ranks())[0] == {"a": f"{FAILED}not finite", "b": 1.0}


# The command.


def command(model, output_dir, *more):
    words = ("eval/generation.py", "--model_name", model, "--corpus", VALIDATION, "--prompt_seconds", 1.6)
    words += ("--recording_seconds", 2.6, "--seconds", 0.8, "--min_seconds", 0.8, "--limit", 3, "--num_samples", 2)
    words += ("--speaker_model", SPEAKER, "--asr_model", RECOGNISER, "--quality", "none", "--batch_size", 2)
    return *words, "--output_dir", output_dir, *more


def result_files(folder):
    return {path.name: json.loads(path.read_text()) for path in folder.glob("*.json") if path.name != "prompts.json"}


@pytest.fixture(scope="module")
def judged(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("table") / "generation"
    code, stderr = run_here(*command(model_folder, folder))
    assert code == 0, stderr
    return folder


def test_one_command_from_prompts_to_a_table(judged, model_folder, tmp_path, capsys):
    results = result_files(judged)
    own = model_folder.name
    assert set(results) == {f"{own}.json", "recording.json", "shuffled.json", "reconstruction_q4.json"}
    assert {len(result["samples"]) for result in results.values()} == {3, 6}
    assert len({result["prompts_sha256"] for result in results.values()}) == 1
    assert (
        results[f"{own}.json"]["made_by"]["model_sha256"]
        and results["recording.json"]["measures"]["similarity"]["sha256"]
    )
    assert all({"mean", "interval"} <= result["results"]["similarity"].keys() for result in results.values())
    before = {path: path.read_bytes() for path in judged.rglob("*.json")}
    assert run_here(*command(model_folder, judged))[0] == 0  # again: nothing is drawn or heard
    assert {path: path.read_bytes() for path in judged.rglob("*.json")} == before
    judged = Path(shutil.copytree(judged, tmp_path / "more"))
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for path in (judged / own).glob("*_0.wav"):
        shutil.copy(path, theirs)
    script, _, _, *flags = command(model_folder, judged, "--wavs", theirs)
    code, stderr = run_here(script, *flags)
    assert code == 0, stderr
    code, stderr = run_here(script, *flags, "--wavs", shutil.copytree(theirs, tmp_path / "other" / "theirs"))
    assert code == 1 and "theirs.json' is of another system, with wavs" in stderr and "give this one a --name" in stderr
    capsys.readouterr()
    report.report(results=(judged,), output_file=tmp_path / "r.md", generations_picture=tmp_path / "r.png")
    text = capsys.readouterr().out
    table, differences = text.split("### Differences")
    assert (
        cells(table, "theirs")["speaker similarity"] and cells(table, own)["ended by itself (%)"] == "0.0 (0.0 to 0.0)"
    )
    assert "CSM-1.3B, Q = 4 [arXiv 2509.14882, by a digest]" in table
    assert f"| speaker similarity | {own} | shuffled |" in differences and "| recording | shuffled |" not in differences
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.distributed
def test_two_ranks_and_a_kill_change_nothing(judged, model_folder, tmp_path):
    again = tmp_path / "generation"
    code, stderr = run_here(*command(model_folder, again))
    assert code == 0, stderr
    # As after a kill: samples, a reconstruction and values are gone, and two ranks go on.
    (again / model_folder.name / "results.jsonl").unlink()
    next((again / "reconstruction_q4").glob("*.wav")).unlink()
    shutil.rmtree(again / "measured" / "transcripts")
    (log,) = (again / "measured" / "similarity").glob("*/*.jsonl")
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:4]) + '{"half a l')
    run_ranks(2, command(model_folder, again), tmp_path / "log")
    for name, expected in result_files(judged).items():
        found = json.loads((again / name).read_text())
        for sample, other in zip(found["samples"], expected["samples"], strict=True):
            sample.pop("real_time_factor", None), other.pop("real_time_factor", None)
        assert found["samples"] == expected["samples"] and found["audio_sha256"] == expected["audio_sha256"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--wavs", "x"), "give either a --model_name or a folder of --wavs"),
        (("--wavs_hold_prompt",), "--wavs_hold_prompt is of --wavs"),
        (("--name", "recording"), "a system cannot be called 'recording'"),
        (("--name", "a/b"), "--name is 'a/b'"),
        (("--batch_size", 0), "--batch_size is 0"),
        (("--name", ".."), "--name is '..'"),
        (("--num_quantizers", 9), "num_quantizers is 9, but the codec"),
        (("--text_model", "x", "--speaker_model", "nowhere"), "the speaker model folder 'nowhere' does not exist"),
    ],
)
def test_mistakes_get_one_sentence(model_folder, tmp_path, flags, message, judged):
    shutil.copytree(judged, tmp_path / "generation")
    code, stderr = run_here(*command(model_folder, tmp_path / "generation", *flags))
    assert code == 1 and message in stderr and "Traceback" not in stderr
