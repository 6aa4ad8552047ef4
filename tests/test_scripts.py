"""The commands after training: convert, load with `transformers`, continue."""

import json
import os
import shutil

import numpy as np
import pytest
import soundfile
import torch
import torch.distributed.checkpoint as dcp
from conftest import TINY, next_command, run_here
from forked_ranks import run_ranks
from simulated import text_from_codes
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from llama_mimi.audio.reading import read_audio
from llama_mimi.checkpoint.architectures import save_run_record, speech_config
from llama_mimi.checkpoint.conversion import convert_checkpoint, prepare_base_model
from llama_mimi.checkpoint.dcp import find_step, load_model_state
from llama_mimi.checkpoint.huggingface import model_args
from llama_mimi.common.errors import UserError
from llama_mimi.generation.continuation import encode_prompts, for_model, settings_note
from llama_mimi.generation.loading import load_speech_model
from llama_mimi.generation.options import SamplingOptions
from llama_mimi.model.llama import FLAVORS, LlamaMimi, LlamaMimiArgs


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tokenizer):
    """The folder of a run with random weights and two steps; the newer step is incomplete."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    args = LlamaMimiArgs(**{**vars(FLAVORS["tiny"]), "vocab_size": tokenizer.vocabulary.size, "max_seq_len": 256})
    model = LlamaMimi(args)
    with torch.no_grad():
        model.init_weights()
    dcp.save(model.state_dict(), checkpoint_id=folder / "checkpoint" / "step-20", no_dist=True)
    (folder / "checkpoint" / "step-30").mkdir()
    save_run_record(str(folder), speech_config(args, tokenizer, str(TINY / "mimi")), tokenizer)
    settings = {"job": {"dump_folder": str(folder)}, "training": {"steps": 20}}
    (folder / "job_config.json").write_text(json.dumps(settings))
    return folder, model


@pytest.fixture(scope="module")
def converted(trained, tmp_path_factory):
    output = tmp_path_factory.mktemp("models") / "tiny"
    command = ["scripts/convert_dcp_to_hf.py", "--checkpoint", trained[0] / "checkpoint", "--output_dir", output]
    said = run_ranks(1, command, output.with_name("log"))
    assert "step-30' is incomplete" in said and "step-20" in said
    assert next_command(said) == f"python inference.py --model_name {output} --prompt assets/tiny/prompt.wav"
    return output


def test_stock_transformers_loads_the_result(trained, converted):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(converted), AutoTokenizer.from_pretrained(converted)
    assert (type(model), model.config.num_quantizers) == (LlamaForCausalLM, 4)
    text = text_from_codes(torch.tensor([[3, 5, 7, 9]]))
    assert text == "<audio><3_0><5_1><7_2><9_3></audio>"
    ids_1L = tokenizer(text, return_tensors="pt").input_ids
    assert ids_1L.tolist() == [[tokenizer.bos_token_id, 1536, 512 + 12, 512 + 21, 512 + 30, 512 + 39, 1537]]
    torch.testing.assert_close(model(ids_1L).logits, trained[1](ids_1L).compute(), atol=1e-5, rtol=0)


def test_converted_folder_explains_itself(converted):
    config = json.loads((converted / "config.json").read_text())
    assert config["num_quantizers"] == 4 and config["codec"] == str(TINY / "mimi") and config["tie_word_embeddings"]
    assert not list(converted.glob("*.bin")) and list(converted.glob("*.safetensors"))
    assert json.loads((converted / "generation_config.json").read_text())["eos_token_id"] == 1537
    assert "| quantizer levels | 4 |" in (converted / "README.md").read_text()
    assert json.loads((converted / "training_config.json").read_text()) == {"training": {"steps": 20}}


def test_bfloat16_and_a_single_step(trained, tmp_path):
    convert_checkpoint(trained[0] / "checkpoint" / "step-20", tmp_path / "m", dtype="bfloat16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.get_input_embeddings().weight, trained[1].tok_embeddings.weight.bfloat16())
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "is not a complete step .* and does not contain one"),
        (lambda step: (step / ".metadata").write_bytes(b"not a pickle"), "is missing or damaged"),
        (lambda step: next(step.glob("*.distcp")).unlink(), "is missing or truncated: it has 0 of"),
        (lambda step: os.truncate(next(step.glob("*.distcp")), 1000), "is missing or truncated: it has 1,000 of"),
    ],
)
def test_damaged_checkpoints_are_refused_by_name(trained, tmp_path, damage, message):
    shutil.copytree(trained[0] / "checkpoint", tmp_path / "checkpoint")
    damage(tmp_path / "checkpoint" / "step-20")
    args = model_args(LlamaConfig.from_pretrained(trained[0] / "hf_assets"))
    with pytest.raises(UserError, match=message) as error:
        load_model_state(find_step(tmp_path / "checkpoint"), args)
    assert "step-" in str(error.value)


def test_a_checkpoint_of_another_shape_is_refused(trained):
    step = trained[0] / "checkpoint" / "step-20"
    for key, message in (("vocab_size", "Size mismatch"), ("n_layers", "Missing key")):
        args = model_args(LlamaConfig.from_pretrained(trained[0] / "hf_assets"))
        setattr(args, key, getattr(args, key) + 4)
        with pytest.raises(UserError, match=f"step-20' does not fit the config of this run .*{message}"):
            load_model_state(step, args)


def test_continuation(converted, tmp_path, capsys):
    """A seed gives the same audio, also in a stream. A text needs no prompt."""

    def run_inference(name, *words):
        path = tmp_path / f"{name}.wav"
        sampling = ("--seconds", 0.8, "--min_seconds", 0.8, "--seed", 3)
        assert run_here("inference.py", "--model_name", converted, "--output_file", path, *sampling, *words)[0] == 0
        samples_S, rate = soundfile.read(path, dtype="int16")
        assert rate == 24_000 and len(samples_S) % 1920 == 0
        return samples_S.astype(int), capsys.readouterr().out

    prompt = ("--prompt", TINY / "prompt.wav")
    first_S, second_S, stream_S = (
        run_inference(*words)[0] for words in (("a", *prompt), ("b", *prompt), ("c", *prompt, "--stream"))
    )
    assert np.array_equal(first_S, second_S) and np.abs(first_S - stream_S).max() <= 1
    assert soundfile.info(TINY / "prompt.wav").frames + 10 * 1920 <= len(first_S)
    text_S, said = run_inference("said", "--text", "one two")
    assert len(text_S) == 10 * 1920 and "0.00 s of prompt, 0.80 s of continuation" in said
    salmon = "assets/tiny/benchmarks/salmon"
    assert next_command(said) == f"python eval/salmon.py --model_name {converted} --data_dir {salmon}"


def test_ranks_share_a_folder_of_prompts(converted, tmp_path):
    """Groups do not depend on the number of ranks, so files do not depend on it either."""
    (tmp_path / "in").mkdir()
    for path in sorted((TINY / "benchmarks" / "storycloze").glob("*.ogg"))[:6]:
        shutil.copy(path, tmp_path / "in")
    for num_ranks in (1, 2):
        words = ["--model_name", converted, "--prompts", tmp_path / "in", "--output_dir", tmp_path / f"{num_ranks}"]
        words += ["--seconds", 0.8, "--batch_size", 1]
        said = run_ranks(num_ranks, ["inference.py", *words], tmp_path / "log")
        assert f"6 results are in {tmp_path / str(num_ranks)}; see " in said
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / n).glob("*.wav")} for n in ("1", "2"))
    assert one == two and len(one) == 6


def test_transcription(converted, tmp_path, capsys):
    """One file is printed, and a folder gives one record for each file. A model needs the task "asr"."""
    words = ["inference.py", "--model_name", tmp_path / "model", "--transcribe"]
    shutil.copytree(converted, tmp_path / "model")
    code, stderr = run_here(*words, TINY / "prompt.wav")
    assert code == 1 and "transcription needs the task 'asr', but the model was trained on tts" in stderr
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"tasks": ["audio", "asr"]}))
    capsys.readouterr()
    assert run_here(*words, TINY / "prompt.wav")[0] == 0
    printed = capsys.readouterr().out
    (tmp_path / "in").mkdir()
    shutil.copy(TINY / "prompt.wav", tmp_path / "in")
    code, stderr = run_here(*words, tmp_path / "in")
    assert code == 1 and "--transcribe with a folder need --output_dir" in stderr
    assert run_here(*words, tmp_path / "in", "--output_dir", tmp_path / "out")[0] == 0
    (line,) = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert (record["file"], record["prompt"]) == ("prompt.txt", "prompt.wav") and record["transcript"]
    assert printed == f"{record['transcript']}\n"
    for flags in (("--num_samples", 2), ("--seconds", 3), ("--output_file", "a.wav")):
        code, stderr = run_here(*words, TINY / "prompt.wav", *flags)
        assert code == 1 and "--transcribe does not sample; remove --output_file" in stderr
    code, stderr = run_here("inference.py", "--model_name", tmp_path / "model", "--text", "one")
    assert code == 1 and "a text to speak needs the task 'tts', but the model was trained on audio, asr" in stderr


def test_released_layout_works(tokenizer, tmp_path):
    """As in llm-jp/Llama-Mimi-*, the config has num_quantizers but no codec. The flag --codec sets the codec."""
    config = LlamaConfig.from_pretrained(TINY / "llama")
    config.update({"vocab_size": tokenizer.vocabulary.size, "num_quantizers": 4})
    decoder = LlamaForCausalLM(config)
    decoder.generation_config = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9)  # as Llama 3.2
    decoder.save_pretrained(tmp_path)
    tokenizer.text_tokenizer.save_pretrained(tmp_path)
    assert "codec" not in json.loads((tmp_path / "config.json").read_text())
    command = ["inference.py", "--model_name", tmp_path, "--prompt", TINY / "prompt.wav", "--seconds", 0.5]
    command += ["--output_file", tmp_path / "c.wav", "--num_samples", 2, "--codec", TINY / "mimi"]
    said = run_ranks(1, command, tmp_path / "log")
    assert (tmp_path / "c_0.wav").exists() and (tmp_path / "c_1.wav").exists()
    taken = "--top_p 0.9 (its generation config), --last_frame codec (a released checkpoint)"
    assert said.count(f"defaults of this checkpoint: {taken}\n") == 1


def test_a_released_checkpoint_continues_as_the_release_does_unless_flags_say_otherwise(converted, tmp_path, codec):
    """The checkpoint sets only ``last_frame`` and ``top_p``; other settings of its generation config are not used."""
    shutil.copytree(converted, tmp_path / "released")
    for name, changes in (("config.json", {}), ("generation_config.json", {"top_p": 0.9, "temperature": 0.6})):
        content = json.loads((converted / name).read_text()) | changes
        content.pop("codec_sliding_window", None)
        (tmp_path / "released" / name).write_text(json.dumps(content))
    models = [load_speech_model(str(folder)) for folder in (converted, tmp_path / "released")]
    prompt = read_audio(TINY / "prompt.wav", 24_000, max_seconds=0.74)
    padded_TQ, released_TQ = codec.encode([prompt.samples_S])[0], codec.encode_as_released(prompt.samples_S)
    assert not torch.equal(padded_TQ, released_TQ)
    for model, options, wanted_TQ, top_p, has_note in (
        (models[0], SamplingOptions(), padded_TQ, 1.0, False),
        (models[0], SamplingOptions(last_frame="codec", top_p=0.5), released_TQ, 0.5, False),
        (models[1], SamplingOptions(), released_TQ, 0.9, True),
        (models[1], SamplingOptions(last_frame="pad", top_p=1.0), padded_TQ, 1.0, False),
    ):
        assert torch.equal(encode_prompts(model, [prompt], options)[0], wanted_TQ)
        sampling = for_model(options, model)
        assert (sampling.top_p, sampling.temperature) == (top_p, 0.8)
        assert ("defaults of this checkpoint" in settings_note(model, options)) == has_note
    (tmp_path / "released" / "generation_config.json").write_text('{"top_p": 5}')
    model = load_speech_model(str(tmp_path / "released"))  # a model that only computes scores needs no sampling
    assert for_model(SamplingOptions(top_p=0.5), model).top_p == 0.5
    with pytest.raises(UserError, match="top_p in the model's generation_config.json is 5"):
        for_model(SamplingOptions(), model)


def test_a_prompt_is_never_replaced(tmp_path):
    """The file name, a link and the number of a sample are checked before the model is loaded."""
    shutil.copy(TINY / "prompt.wav", tmp_path / "a_1.wav")
    (tmp_path / "link.wav").symlink_to("a_1.wav")
    for prompt, words in (
        ("a_1.wav", ("--output_file", tmp_path / "a_1.wav")),
        ("link.wav", ("--output_file", tmp_path / "." / "a_1.wav")),
        ("a_1.wav", ("--output_file", tmp_path / "link.wav", "--stream")),
        ("a_1.wav", ("--output_file", tmp_path / "a.wav", "--num_samples", 2)),
    ):
        rc, said = run_here("inference.py", "--model_name", "models/none", "--prompt", tmp_path / prompt, *words)
        assert rc == 1 and "are the same file" in said
    assert (tmp_path / "a_1.wav").read_bytes() == (TINY / "prompt.wav").read_bytes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--prompt", "nothing.wav"), "'nothing.wav' does not exist"),
        (("--prompts", "assets/tiny"), "or set one of --prompts, --texts and --transcribe"),
        (("--texts", "README.md"), "set --prompt, --text or both; or set one of"),
        (("--batch_size", "4"), "--batch_size is 4; set it to 1 or more, and set --output_dir"),
        (("--stream", "--num_samples", "2"), "--stream supports only one sample of one prompt; remove"),
        (("--model_name", "models/no/such"), "model folder 'models/no/such' does not exist"),
        (("--model_name", "assets/tiny/mimi"), "is of type 'mimi'; choose a model of type llama or csm"),
        (("--device", "nothing"), "device 'nothing' is not available"),
    ],
)
def test_inference_mistakes_get_one_sentence(converted, tmp_path, flags, message):
    model = () if "--model_name" in flags else ("--model_name", converted)
    prompt = () if "--prompt" in flags else ("--prompt", TINY / "prompt.wav")
    code, stderr = run_here("inference.py", *model, *prompt, "--output_file", tmp_path / "c.wav", *flags)
    assert code == 1 and message in stderr and stderr.count("error: ") == 1


def write_base(folder, **config):
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig.from_pretrained(TINY / "llama", **config)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY / "llama").save_pretrained(folder)
    return str(folder)


def test_prepare_base_model(tmp_path, capsys):
    common = {"codec": str(TINY / "mimi"), "num_quantizers": 8}
    prepare_base_model(write_base(tmp_path / "base"), tmp_path / "extended", **common)
    old, new = (
        LlamaForCausalLM.from_pretrained(tmp_path / name).get_input_embeddings().weight.detach()
        for name in ("base", "extended")
    )
    assert new.shape == (512 + 8 * 256 + 2, 192) and torch.equal(new[:512], old)
    assert new[512:].mean().item() == pytest.approx(old.mean().item(), abs=2e-3)
    prepare_base_model(str(tmp_path / "extended"), tmp_path / "twice", **common)
    printed = capsys.readouterr().out
    assert "2,562 vocabulary entries" in printed
    assert printed.endswith(f'next: set model.hf_assets_path = "{tmp_path}/twice" in a config\n')


@pytest.mark.parametrize("tied", [True, False])
def test_prepare_base_model_without_text(tied, tmp_path):
    base = write_base(tmp_path / "base", tie_word_embeddings=tied)
    for vocabulary in ("llama", "audio"):
        prepare_base_model(base, tmp_path / vocabulary, codec=str(TINY / "mimi"), vocabulary=vocabulary)
    whole, small = (LlamaForCausalLM.from_pretrained(tmp_path / name) for name in ("llama", "audio"))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "audio")) == small.config.vocab_size == 3 + 4 * 256 + 2
    rows = [508, 509, 510, *range(512, 512 + 4 * 256 + 2)]  # BOS, EOS, padding; audio tokens
    weights, small_weights = whole.state_dict(), small.state_dict()
    assert weights.keys() == small_weights.keys()
    for name, weight in weights.items():
        of_tokens = name in ("model.embed_tokens.weight", "lm_head.weight")
        assert torch.equal(small_weights[name], weight[rows] if of_tokens else weight), name
    for settings in (small.config, small.generation_config):
        assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (0, 1, 2)
