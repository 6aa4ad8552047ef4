"""Folders that this project writes are the same model, with the same tokens, in transformers 4.x as in 5.x."""

import json
import logging
import math
import shutil
import subprocess
import sys

import build_tiny_assets
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import TINY
from torchtitan.models.llama3.model.args import RoPEScalingArgs
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llama_mimi.audio.mimi import MimiCodec
from llama_mimi.audio.reading import read_audio
from llama_mimi.checkpoint.conversion import convert_checkpoint, prepare_base_model
from llama_mimi.checkpoint.huggingface import hf_config, model_args, save_folder
from llama_mimi.checkpoint.run_record import save_run_record, speech_config
from llama_mimi.model.llama import FLAVORS, LLAMA_3_1_ROPE, LLAMA_3_2_ROPE, LlamaMimi, LlamaMimiArgs
from llama_mimi.tokens.sequences import load_sequences

SCALINGS = {"default": RoPEScalingArgs(scaling_factor=1.0), "factor 32": LLAMA_3_2_ROPE, "factor 8": LLAMA_3_1_ROPE}
ROPE_KEYS_OF_4 = {"rope_type", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}


def args_of(scaling: str, vocab_size: int = 512, tied: bool = True) -> LlamaMimiArgs:
    own = {"n_layers": 2, "max_seq_len": 256, "vocab_size": vocab_size, "enable_weight_tying": tied}
    return LlamaMimiArgs(**vars(FLAVORS["tiny"]) | own | {"rope_scaling_args": SCALINGS[scaling]})


def record(folder, scaling, vocabulary="llama", tied=True):
    sequences = load_sequences(str(TINY / "llama"), str(TINY / "mimi"), 4, vocabulary)
    args = args_of(scaling, sequences.vocabulary.size, tied)
    save_run_record(str(folder), speech_config(args, sequences, str(TINY / "mimi")), sequences)
    return folder / "hf_assets"


def convert(folder, scaling, vocabulary="llama", tied=True):
    torch.manual_seed(0)
    model = LlamaMimi(model_args(LlamaConfig.from_pretrained(record(folder, scaling, vocabulary, tied))))
    with torch.no_grad():
        model.init_weights()
    dcp.save(model.state_dict(), checkpoint_id=folder / "checkpoint" / "step-1", no_dist=True)
    convert_checkpoint(folder / "checkpoint", folder / "converted")
    return folder / "converted"


def prepare(folder, scaling, vocabulary="llama", tied=True, **flags):
    if not (folder / "base").exists():
        torch.manual_seed(0)
        base = LlamaForCausalLM(hf_config(args_of(scaling, tied=tied), bos_token_id=508, eos_token_id=509))
        base.save_pretrained(folder / "base")
        AutoTokenizer.from_pretrained(TINY / "llama").save_pretrained(folder / "base")
    flags |= {"codec": str(TINY / "mimi"), "vocabulary": vocabulary}
    prepare_base_model(str(folder / "base"), folder / "prepared", **flags)
    return folder / "prepared"


def prepare_without_weights(folder, scaling, vocabulary="llama", tied=True):
    return prepare(folder, scaling, vocabulary, tied, random_weights=True)


def json_files(folder):
    return {name: json.loads((folder / name).read_text()) for name in ("config.json", "tokenizer_config.json")}


def frequencies_of_4(config: dict) -> torch.Tensor:
    """Of the rotary embedding, from what 4.56.2 takes from a config (`LlamaConfig`, `modeling_rope_utils.py`)."""
    theta, scaling = config.get("rope_theta", 10000.0), config.get("rope_scaling")
    frequency = 1.0 / theta ** (torch.arange(0, config["head_dim"], 2) / config["head_dim"])
    if scaling is None:
        return frequency
    assert scaling.keys() == ROPE_KEYS_OF_4 and scaling["rope_type"] == "llama3"
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # fast ones stay, slow ones are divided, those between are mixed
    return kept * frequency + (1 - kept) * frequency / scaling["factor"]


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("write", [record, convert, prepare, prepare_without_weights])
def test_a_written_folder_is_read_alike(write, scaling, tmp_path, monkeypatch, caplog, recwarn):
    folder = write(tmp_path, scaling)
    config, words = json_files(folder).values()
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.clear()
    recwarn.clear()
    loaded = LlamaConfig.from_pretrained(folder)
    assert not caplog.records and not recwarn.list
    assert loaded.rope_parameters == hf_config(args_of(scaling)).rope_parameters
    assert model_args(loaded).rope_scaling_args == SCALINGS[scaling]
    expected = LlamaRotaryEmbedding(loaded).inv_freq
    torch.testing.assert_close(frequencies_of_4(config), expected, atol=0, rtol=1e-6)
    assert config.get("torch_dtype") == config.get("dtype")
    assert ("dtype" in config) == (write is not record)

    assert words["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "extra_special_tokens" not in words
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("<audio><3_0></audio>").input_ids == [508, 1536, 524, 1537]

    save_folder(tmp_path / "again", loaded, tokenizer)
    again, _ = json_files(tmp_path / "again").values()
    assert again == config


@pytest.mark.parametrize("flags", [{}, {"random_weights": True}], ids=["weights", "no weights"])
def test_a_base_model_written_by_4_gives_the_same_folder(flags, tmp_path):
    """The form of Llama 3's own repositories; <|eot_id|> is also named as a special token without a role."""
    config, words = json_files(prepare(tmp_path, "factor 8", **flags)).values()
    ids = AutoTokenizer.from_pretrained(tmp_path / "prepared")("old <|eot_id|><audio><3_0>").input_ids

    base = json_files(tmp_path / "base")
    for key in ("rope_parameters", "dtype"):
        del base["config.json"][key]
    base["config.json"] |= {key: config[key] for key in ("rope_theta", "rope_scaling", "torch_dtype")}
    base["tokenizer_config.json"] |= {"tokenizer_class": "PreTrainedTokenizerFast", "extra_special_tokens": {}}
    base["tokenizer_config.json"]["additional_special_tokens"] = ["<|eot_id|>"]
    for name, content in base.items():
        (tmp_path / "base" / name).write_text(json.dumps(content))
    shutil.rmtree(tmp_path / "prepared")
    config_again, words_again = json_files(prepare(tmp_path, "factor 8", **flags)).values()
    assert config_again == config
    assert words_again == words | {"additional_special_tokens": ["<|eot_id|>"]}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "prepared")
    assert tokenizer.extra_special_tokens == ["<|eot_id|>"] and tokenizer("old <|eot_id|><audio><3_0>").input_ids == ids


def test_the_tiny_base_model_is_what_its_script_writes(tmp_path):
    lines = [line for path in sorted(TINY.glob("corpus/train-*")) for line in pq.read_table(path)["text"].to_pylist()]
    build_tiny_assets.write_llama(tmp_path, lines)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (TINY / "llama").iterdir()}
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (TINY / "llama" / path.name).read_bytes(), path.name
    expected = LlamaRotaryEmbedding(LlamaConfig.from_pretrained(tmp_path)).inv_freq
    torch.testing.assert_close(frequencies_of_4(json_files(tmp_path)["config.json"]), expected, atol=0, rtol=1e-6)


ALONE = ["uv", "run", "--isolated", "--no-project", "--python", sys.executable]
ALONE += ["--with", "transformers==4.56.2", "--with", "torch==2.11.0", "python"]

READ = """
import sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
version, output, *folders = sys.argv[1:]
assert transformers.__version__.startswith(version), transformers.__version__
found = []
for folder in folders:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    text = "The old doctor, 12_3 <b> " if len(tokenizer) > 1100 else ""  # "audio" has none
    ids = [tokenizer(t).input_ids for t in ("", f"{text}<audio><3_0><5_1><7_2><255_3></audio>{text}")]
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    tokens = torch.randint(len(tokenizer), (1, 200), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)  # at a start all tokens are about as likely, whatever the positions
        found.append((ids, special, tokenizer.decode(ids[1]), str(model.dtype), model(tokens).logits))
torch.save(found, output)
"""


@pytest.mark.network
def test_transformers_4_computes_the_same(tmp_path):
    folders = [
        write(tmp_path / f"{write.__name__}-{scaling}-{vocabulary}", scaling, vocabulary, tied)
        for write, scaling, vocabulary, tied in (
            (convert, "factor 32", "llama", True),
            (convert, "factor 8", "audio", False),
            (convert, "default", "audio", True),
            (prepare, "factor 8", "llama", False),
            (prepare, "factor 32", "audio", True),
        )
    ]
    for version, python in (("4.56.2", ALONE), ("5.", [sys.executable])):
        command = [*python, "-c", READ, version, tmp_path / version, *folders]
        result = subprocess.run(list(map(str, command)), text=True, capture_output=True, timeout=1200)
        assert result.returncode == 0, result.stderr
    of_4, of_5 = torch.load(tmp_path / "4.56.2"), torch.load(tmp_path / "5.")
    for folder, (*a, logits_4), (*b, logits_5) in zip(folders, of_4, of_5, strict=True):
        assert a == b, folder
        assert logits_5.abs().max() > 1, "differences would show"
        torch.testing.assert_close(logits_4, logits_5, atol=1e-5, rtol=0, msg=str(folder))


ENCODE = """
import sys, torch
from transformers import MimiModel
samples_S, codes_TQ = torch.load(sys.argv[2])
codec = MimiModel.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    codes = codec.encode(samples_S[None, None], num_quantizers=8).audio_codes[0].T
    audio = codec.decode(codes_TQ.T[None]).audio_values[0, 0]
torch.save((codes, audio), sys.argv[2])
"""


@pytest.mark.network
def test_transformers_4_has_no_window(tmp_path):
    """What our "whole" attention gives: the codes and the audio of transformers from before February 2026."""
    samples_S = read_audio(TINY / "prompt.wav", 24_000).samples_S[
        : 20 * 1920
    ]  # more than the tiny codec's window of 1 s
    windowed, whole = (MimiCodec(str(TINY / "mimi"), 8, attention=attention) for attention in ("windowed", "whole"))
    codes_TQ = windowed.encode_as_released(samples_S)
    path = tmp_path / "of_4"
    torch.save((samples_S, codes_TQ), path)
    command = [*ALONE, "-c", ENCODE, str(TINY / "mimi"), str(path)]
    result = subprocess.run(command, text=True, capture_output=True, timeout=1200)
    assert result.returncode == 0, result.stderr
    codes_4_TQ, audio_4_S = torch.load(path)
    assert torch.equal(whole.encode_as_released(samples_S), codes_4_TQ) and not torch.equal(codes_TQ, codes_4_TQ)
    torch.testing.assert_close(whole.decode(codes_TQ), audio_4_S, atol=1e-6, rtol=0)
    assert not torch.allclose(windowed.decode(codes_TQ), audio_4_S, atol=1e-3)
