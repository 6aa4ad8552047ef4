"""Runs that start from a model folder load exactly its weights, or end with an error of one sentence."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import TINY, checked_config
from safetensors.torch import load_file, save_file
from simulated import write_codes
from test_training import flags_of, train

from llama_mimi.checkpoint.architectures import (
    check_initial_weights,
    save_run_record,
    speech_config,
    state_dict_adapter,
)
from llama_mimi.checkpoint.conversion import convert_checkpoint, prepare_base_model
from llama_mimi.checkpoint.dcp import load_model_state
from llama_mimi.common.choices import Architecture
from llama_mimi.common.errors import UserError
from llama_mimi.corpora.code_shards import CodedClip
from llama_mimi.model.architectures import build_model
from llama_mimi.model.llama import FLAVORS, LlamaMimiArgs
from llama_mimi.tokens.tokenizer import load_speech_tokenizer

TEXT_HEADS = {"none": (False, False), "tied": (True, True), "separate": (True, False)}


def set_up() -> None:
    FLAVORS["tiny_untied"] = replace(FLAVORS["tiny"], enable_weight_tying=False)


def converted(
    folder: Path, text_head: str = "none", architecture: Architecture = "hierarchical"
) -> tuple[LlamaMimiArgs, dict[str, torch.Tensor]]:
    """Write a converted model with random weights; return its arguments and weights."""
    tokenizer = load_speech_tokenizer(str(TINY / "llama"), str(TINY / "mimi"), 4, "llama", architecture)
    predicts_text, is_tied = TEXT_HEADS[text_head]
    own = {"architecture": architecture, "predicts_text": predicts_text, "num_quantizers": 4, "codebook_size": 256}
    own |= {"vocab_size": tokenizer.vocabulary.size, "enable_weight_tying": is_tied or architecture == "flattened"}
    args = replace(FLAVORS["tiny"], **own)
    torch.manual_seed(0)
    model = build_model(args)
    with torch.no_grad():
        model.init_weights()
    training = {"tasks": ["audio", "tts"], "max_audio_seconds": 5.0}
    save_run_record(str(folder / "run"), speech_config(args, tokenizer, str(TINY / "mimi"), **training), tokenizer)
    dcp.save(model.state_dict(), checkpoint_id=folder / "run/checkpoint/step-1", no_dist=True)
    convert_checkpoint(folder / "run/checkpoint", folder / "model")
    return args, model.state_dict()


@pytest.mark.parametrize("text_head", TEXT_HEADS)
def test_a_run_starts_from_a_converted_hierarchical_folder(text_head, tmp_path):
    """With a learning rate of zero, two ranks save the weights of the run that was converted."""
    args, wanted = converted(tmp_path, text_head)
    settings = {"model.architecture": "hierarchical", "model.hf_assets_path": tmp_path / "model"}
    settings |= {"checkpoint.initial_load_in_hf": True, "training.steps": 1, "optimizer.lr": 0.0}
    settings |= {"data.tasks": "asr"} if args.predicts_text else {}
    settings |= {"model.flavor": "tiny_untied"} if text_head == "separate" else {}
    train(2, tmp_path / "new", settings, set_up=set_up)
    found = load_model_state(tmp_path / "new/checkpoint/step-1", args)
    assert found.keys() == wanted.keys()
    assert not [name for name, weight in wanted.items() if not torch.equal(found[name], weight)]
    log = (tmp_path / "new/log.txt").read_text()
    model = f"'{tmp_path / 'model'}', a hierarchical Llama-Mimi, Q = 4, codec '{TINY / 'mimi'}' with sliding-window"
    assert f"initial weights: {model} attention" in log
    if text_head == "none":
        train(1, tmp_path / "new", settings | {"training.steps": 2})
        assert "initial weights" not in (tmp_path / "new/log.txt").read_text(), "the second run loads step 1"


def test_an_audio_run_starts_from_a_folder_with_a_text_head(tmp_path):
    """The level-0 matrix of the new model is the part of the text head that CSM names lm_head."""
    args, wanted = converted(tmp_path, "tied")
    new = replace(args, predicts_text=False, enable_weight_tying=False)
    adapter = state_dict_adapter(new, str(tmp_path / "model"))
    check_initial_weights(str(tmp_path / "model"), adapter)
    found = adapter.from_hf(load_file(tmp_path / "model" / "model.safetensors"))
    ids = args.vocabulary.admissible_ids(torch.device("cpu"))[0]
    assert torch.equal(found.pop("output.weight"), wanted["tok_embeddings.weight"][ids])
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A converted model of each architecture, folders without a usable model, a codec, and a corpus of its codes."""
    folder = tmp_path_factory.mktemp("folders")
    for name in ("flattened", "hierarchical"):
        converted(folder / name, architecture=name)
        (folder / name / "model").rename(folder / f"{name}-model")
    base = {"base_model": str(TINY / "llama"), "codec": str(TINY / "mimi")}
    prepare_base_model(**base, output_dir=folder / "without weights", random_weights=True)
    (folder / "adapter").mkdir()
    (folder / "adapter/adapter_config.json").write_text("{}")
    codec = shutil.copytree(TINY / "mimi", folder / "codec")
    weights = load_file(codec / "model.safetensors")
    save_file({name: weight * 1.01 for name, weight in weights.items()}, codec / "model.safetensors", {"format": "pt"})
    clips = [CodedClip("clip", np.zeros((20, 8), np.uint16), 1.6, False)]
    write_codes(folder / "codes", str(TINY / "mimi"), [clips])
    edit(folder / "flattened-model", folder / "first release", codec_sliding_window=None, codec=None)
    edit(folder / "flattened-model", folder / "lost codec", codec="/nowhere/mimi")
    depth = json.loads((folder / "hierarchical-model/config.json").read_text())["depth_decoder_config"]
    edit(folder / "hierarchical-model", folder / "deeper", depth_decoder_config=depth | {"num_hidden_layers": 2})
    return folder


def edit(source: Path, folder: Path, **changes: Any) -> None:
    """Copy a model folder, and change or (None) remove entries of its configuration."""
    config = json.loads((shutil.copytree(source, folder) / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if changes.get(key, True) is not None}
    (folder / "config.json").write_text(json.dumps(kept))


def start_from(folder: Path, *flags: object) -> None:
    """Check the config of a run that starts from a folder."""
    common = {"model.hf_assets_path": folder, "checkpoint.initial_load_in_hf": True}
    checked_config([*flags_of(folder / "run", common), *map(str, flags)])


HIERARCHICAL = "--model.architecture hierarchical"


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("flattened-model", "--codec.num_quantizers 8", "do not fit 8 quantizers with 256 codes; use the codec"),
        ("flattened-model", "--codec.name codec", "was trained with '.*/tiny/mimi', which has other weights; set"),
        ("flattened-model", "--codec.no-sliding_window", "codec.sliding_window = True, but the current value is False"),
        ("flattened-model", "--model.vocabulary audio", "vocab_size = 1538, but the current .* 1029; set .*vocabulary"),
        ("flattened-model", "--model.flavor 256x2", "hidden_size = 192, but the current value is 256; set"),
        ("first release", "", "codec.sliding_window = False, but the current value is True; set .*sliding_window"),
        ("first release", "--codec.no-sliding_window --training.dataset codes", "'.*codes' .*_window, or tokenise"),
        (
            "hierarchical-model",
            "",
            "made with model_type = 'csm', but the current value is 'llama'; set model.architecture",
        ),
        ("hierarchical-model", f"{HIERARCHICAL} --data.tasks asr", "text_head = None, .* is 'tied'; set .*data.tasks"),
        ("hierarchical-model", f"{HIERARCHICAL} --codec.name codec", "which has other weights; set codec.name"),
        ("deeper", HIERARCHICAL, "depth_decoder_config.num_hidden_layers = 2, but the current value is 1; set"),
        ("without weights", "", "does not contain the initial weights of this run: .*38 missing, first 'model.embed_"),
        ("adapter", "", "contains only a LoRA adapter; choose the parent folder, with the merged"),
        ("owner/model", "", "create the folder with `.*`, or download a Llama-Mimi with `uv run hf download`"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(name, flags, message, folders):
    words = [folders / word if word in ("codec", "codes") else word for word in flags.split()]
    with pytest.raises(UserError, match=message) as error:
        start_from(folders / name, *words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("flattened-model", "", "a flattened Llama-Mimi, Q = 4, codec '.*/tiny/mimi' with sliding-window"),
        (
            "lost codec",
            "--codec.name codec",
            ".*codec '/nowhere/mimi' with sliding-window attention, tasks audio tts, clips of up to 5 s",
        ),
        ("flattened-model", HIERARCHICAL, "a flattened Llama-Mimi, Q = 4"),
        (
            "first release",
            "--codec.no-sliding_window",
            ".* .first release., Q = 4, codec 'kyutai/mimi' with unlimited attention",
        ),
    ],
)
def test_the_log_describes_the_folder(name, flags, message, folders, caplog):
    caplog.set_level("INFO")
    words = [folders / word if word == "codec" else word for word in flags.split()]
    start_from(folders / name, *words)
    assert re.search(f"initial weights: '{folders / name}', {message}", caplog.text)


def test_a_base_model_is_not_a_trained_model(folders, model_folder, tmp_path, caplog):
    """A trained model needs no preparation. A prepared model has other codecs without an error."""
    caplog.set_level("INFO")
    start_from(model_folder, "--codec.name", folders / "codec")
    assert f"initial weights: '{model_folder}', a base model that was not trained on audio" in caplog.text
    for name in ("flattened-model", "hierarchical-model", "first release"):
        with pytest.raises(UserError, match="already has audio tokens; set model.hf_assets_path to this folder"):
            prepare_base_model(str(folders / name), tmp_path / "prepared", str(TINY / "mimi"))
