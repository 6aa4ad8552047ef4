"""Damaged, incomplete, misnamed or malicious model folders cause an error of one sentence, and never wrong weights."""

import builtins
import json
import shutil
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import TINY
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from llama_mimi.audio.mimi import MimiCodec, local_codec
from llama_mimi.checkpoint.architectures import (
    check_initial_weights,
    save_run_record,
    speech_config,
    state_dict_adapter,
)
from llama_mimi.checkpoint.conversion import convert_checkpoint, prepare_base_model
from llama_mimi.checkpoint.huggingface import model_args
from llama_mimi.common.errors import UserError
from llama_mimi.common.hub import load_pretrained
from llama_mimi.generation.loading import load_speech_model
from llama_mimi.judging.metrics import load_evaluator
from llama_mimi.model.architectures import build_model
from llama_mimi.tokens.tokenizer import load_speech_tokenizer

LAST_LAYER, NORM = "model.layers.3.mlp.up_proj.weight", "model.norm.weight"


@pytest.fixture
def folder(model_folder, tmp_path):
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100_000])


WRONG_WEIGHTS = {
    "missing": (lambda f: change_weights(f, lambda w: w.pop(NORM)), f"1 missing, first '{NORM}'"),
    "unexpected": (lambda f: change_weights(f, lambda w: w.update({"x.bias": torch.ones(1)})), "1 unexpected, first"),
    "reshaped": (lambda f: change_weights(f, lambda w: w.update({NORM: torch.ones(5)})), "1 of another shape, first"),
    "more layers": (lambda f: change_config(f, num_hidden_layers=6), "18 missing, first 'model.layers.4."),
    "fewer layers": (lambda f: change_config(f, num_hidden_layers=2), "18 unexpected, first 'model.layers.2."),
    "truncated": (truncate, "file not fully covered"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "header too small"),
}


@pytest.mark.parametrize("kind", WRONG_WEIGHTS)
def test_wrong_weights_are_refused(kind, folder, capfd):
    """Generation refuses wrong weights. Training refuses them before TorchTitan reads them."""
    damage, message = WRONG_WEIGHTS[kind]
    args = model_args(AutoConfig.from_pretrained(folder))
    damage(folder)
    if "layers" in kind:  # in training, the flavour has the shape of the config
        args = model_args(AutoConfig.from_pretrained(folder))
    capfd.readouterr()
    for load in (
        lambda name: load_speech_model(name, device="cpu"),
        lambda name: check_initial_weights(name, state_dict_adapter(args, name)),
    ):
        with pytest.raises(UserError) as error:
            load(str(folder))
        assert message in str(error.value) and "\n" not in str(error.value)
    assert "LOAD REPORT" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "[" * 100_000, "maximum recursion depth"),
        ("config.json", '{"model_type": "llama", "hidden_size": "x"}', "Field 'hidden_size' expected int, got str"),
        ("tokenizer.json", "{", "the tokenizer in .* could not be loaded"),
    ],
)
def test_damaged_json_is_one_sentence(name, content, message, folder):
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=message) as error:
        load_speech_model(str(folder), device="cpu")
    assert "\n" not in str(error.value)


def test_int8_is_refused_on_other_devices_than_a_cpu(folder):
    with pytest.raises(UserError, match="--dtype is 'int8', but --device is 'meta'; set --device cpu"):
        load_speech_model(str(folder), device="meta", dtype="int8")
    torch.backends.cuda.enable_cudnn_sdp(True)
    assert load_speech_model(str(folder), device="cpu", dtype="int8").dtype == "int8"
    assert not torch.backends.cuda.cudnn_sdp_enabled(), "cuDNN would build a plan for each length of a prompt"


def test_weights_of_other_kinds_are_refused(folder, tmp_path):
    """A codec with one layer too many in the config, and a base model with a missing tensor, are refused."""
    codec = Path(shutil.copytree(TINY / "mimi", tmp_path / "codec"))
    change_config(codec, num_hidden_layers=3)
    with pytest.raises(UserError, match="is not a complete codec: .* the MimiModel in config.json .*24 missing"):
        MimiCodec(str(codec), 4)
    base = tmp_path / "base"
    LlamaForCausalLM(AutoConfig.from_pretrained(TINY / "llama")).save_pretrained(base)
    for path in (TINY / "llama").glob("tokenizer*"):
        shutil.copy(path, base)
    change_weights(base, lambda weights: weights.pop(LAST_LAYER))
    with pytest.raises(UserError, match=f"is not a complete base model: .*1 missing, first '{LAST_LAYER}'"):
        prepare_base_model(str(base), tmp_path / "prepared", str(TINY / "mimi"))


def test_harmless_differences_are_accepted(folder, tmp_path):
    """Tied matrices are accepted, and so are buffers and constants from old versions of transformers."""

    def add(weights):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)

    wanted = load_file(folder / "model.safetensors")
    change_weights(folder, add)
    decoder = load_speech_model(str(folder), device="cpu").decoder
    assert all(torch.equal(decoder.state_dict()[name], weight) for name, weight in wanted.items())
    check_initial_weights(str(folder), state_dict_adapter(model_args(decoder.config), str(folder)))

    GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=1)).save_pretrained(tmp_path)
    old = {f"transformer.h.0.attn.{name}": torch.ones(1) for name in ("bias", "masked_bias")}
    change_weights(tmp_path, lambda weights: weights.update(old))
    load_evaluator(AutoModelForCausalLM, str(tmp_path), torch.device("cpu"), what="language model")
    change_weights(tmp_path, lambda weights: weights.update({"transformer.h.1.ln_1.bias": torch.ones(8)}))
    with pytest.raises(UserError, match=r"1 unexpected, first 'transformer.h.1.ln_1.bias'"):
        load_evaluator(AutoModelForCausalLM, str(tmp_path), torch.device("cpu"), what="language model")


@pytest.mark.parametrize("model_type", ["unknown", "llama"])
def test_code_in_a_folder_is_not_run(model_type, folder, tmp_path, monkeypatch):
    def asked(*args):
        raise AssertionError("input was read")

    monkeypatch.setattr(builtins, "input", asked)
    auto_map = {"AutoConfig": "code.Odd", "AutoModelForCausalLM": "code.Odd", "AutoTokenizer": ["code.Odd", "code.Odd"]}
    change_config(folder, model_type=model_type, auto_map=auto_map)
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Odd: pass\n")
    if model_type == "llama":
        load_speech_model(str(folder), device="cpu")
    else:
        with pytest.raises(UserError, match="contains custom code which must be executed"):
            load_speech_model(str(folder), device="cpu")
    assert not (tmp_path / "ran").exists()


def test_a_local_typo_does_not_ask_the_hub(tmp_path, monkeypatch):
    def connected(*args):
        raise AssertionError("the network was asked")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(socket.socket, "connect", connected)
    (tmp_path / "models").mkdir()
    for name in ("models/tinny", "tinny", "a/b/c", "./tinny"):
        with pytest.raises(UserError, match=f"^the model folder '{name}' does not exist; check the path"):
            load_pretrained(AutoConfig, name, what="model")
    with pytest.raises(UserError, match="^the model in 'owner/tinny' could not be loaded .*check the name"):
        load_pretrained(AutoConfig, "owner/tinny", what="model", local_files_only=True)


def test_a_model_finds_its_codec_from_any_working_directory(folder, tmp_path, monkeypatch):
    (tmp_path / "repository" / "models").mkdir(parents=True)
    moved = folder.rename(tmp_path / "repository" / "models" / "tiny")
    codec = shutil.copytree(TINY / "mimi", tmp_path / "repository" / "assets" / "mimi")
    change_config(moved, codec="assets/mimi")
    for place, name in ((tmp_path / "repository", "models/tiny"), (tmp_path, str(moved)), (moved, ".")):
        monkeypatch.chdir(place)
        assert Path(load_speech_model(name, device="cpu").codec.name).samefile(codec)
    monkeypatch.chdir(tmp_path / "repository")
    assert load_speech_model("models/tiny", device="cpu").codec.name == "assets/mimi", "as results name it"
    assert local_codec("kyutai/mimi", moved) is None and local_codec(str(codec), folder) == str(codec)

    # Conversion keeps the relative path if it is valid in the new folder, and else writes an absolute path.
    tokenizer = load_speech_tokenizer(str(TINY / "llama"), "assets/mimi", 4)
    args = model_args(AutoConfig.from_pretrained(moved))
    save_run_record("run", speech_config(args, tokenizer, "assets/mimi"), tokenizer)
    dcp.save(build_model(args).state_dict(), checkpoint_id="run/checkpoint/step-1", no_dist=True)
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "repository" / "run" / "checkpoint"
    for output_dir, wanted in ((moved.with_name("new"), "assets/mimi"), (tmp_path / "new", str(codec))):
        convert_checkpoint(run, output_dir)
        assert json.loads((output_dir / "config.json").read_text())["codec"] == wanted
    monkeypatch.chdir(tmp_path / "repository")
    alone = moved.rename(tmp_path / "alone")  # older folders: relative to the working directory
    assert load_speech_model(str(alone), device="cpu").codec.name == "assets/mimi"
