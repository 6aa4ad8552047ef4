"""Folders of this project give the same model and the same tokens in transformers 4.x and 5.x."""

import json
import logging
import shutil
import subprocess
import sys

import build_tiny_assets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import TINY
from torchtitan.models.llama3.model.args import RoPEScalingArgs
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llama_mimi.audio.mimi import MimiCodec
from llama_mimi.audio.reading import read_audio
from llama_mimi.checkpoint.architectures import KINDS, save_run_record, speech_config
from llama_mimi.checkpoint.conversion import convert_checkpoint, prepare_base_model
from llama_mimi.checkpoint.huggingface import hf_config, model_args, save_folder
from llama_mimi.model.architectures import build_model
from llama_mimi.model.llama import FLAVORS, LLAMA_3_1_ROPE, LLAMA_3_2_ROPE, LlamaMimiArgs
from llama_mimi.tokens.tokenizer import load_speech_tokenizer

SCALINGS = {"default": RoPEScalingArgs(scaling_factor=1.0), "factor 32": LLAMA_3_2_ROPE, "factor 8": LLAMA_3_1_ROPE}


def args_of(scaling: str, vocab_size: int = 512, tied: bool = True) -> LlamaMimiArgs:
    own = {"n_layers": 2, "max_seq_len": 256, "vocab_size": vocab_size, "enable_weight_tying": tied}
    return LlamaMimiArgs(**vars(FLAVORS["tiny"]) | own | {"rope_scaling_args": SCALINGS[scaling]})


def record(folder, scaling, vocabulary="llama", tied=True, architecture="flattened"):
    tokenizer = load_speech_tokenizer(str(TINY / "llama"), str(TINY / "mimi"), 4, vocabulary, architecture)
    args = args_of(scaling, tokenizer.vocabulary.size, tied)
    args.architecture, args.num_quantizers, args.codebook_size = architecture, 4, 256
    save_run_record(str(folder), speech_config(args, tokenizer, str(TINY / "mimi")), tokenizer)
    return folder / "hf_assets"


def convert(folder, scaling, vocabulary="llama", tied=True, architecture="flattened"):
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(record(folder, scaling, vocabulary, tied, architecture))
    model = build_model(KINDS[architecture].args(config))
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


def prepare_without_weights(folder, scaling):
    return prepare(folder, scaling, random_weights=True)


def json_files(folder):
    return {name: json.loads((folder / name).read_text()) for name in ("config.json", "tokenizer_config.json")}


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
    assert loaded.rope_parameters == (config["rope_scaling"] or {"rope_type": "default"}) | {"rope_theta": 500000.0}
    assert config["rope_theta"] == 500000.0
    assert config.get("torch_dtype") == config.get("dtype")
    assert ("dtype" in config) == (write is not record)

    assert words["model_input_names"] == ["input_ids", "attention_mask"]
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1, "safetensors writes weights with mode 0600"
    assert words["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "extra_special_tokens" not in words
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.model_input_names == words["model_input_names"]
    assert tokenizer("<audio><3_0></audio>").input_ids == [508, 1536, 524, 1537]

    save_folder(tmp_path / "again", loaded, tokenizer)
    again, _ = json_files(tmp_path / "again").values()
    assert again == config


@pytest.mark.parametrize("flags", [{}, {"random_weights": True}], ids=["weights", "no weights"])
def test_a_base_model_written_by_4_gives_the_same_folder(flags, tmp_path):
    """The repositories of Llama 3 have the format of transformers 4. <|eot_id|> is an additional special token."""
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


ALONE = ["uv", "run", "--isolated", "--no-project", "--python", sys.executable]
ALONE += ["--with", "transformers==4.56.2", "--with", "torch==2.11.0", "python"]

READ = """
from transformers import AutoModelForCausalLM, AutoTokenizer
found = []
for folder in words:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    text = "The old doctor, 12_3 <b> " if len(tokenizer) > 1100 else ""  # the vocabulary "audio" has no text
    ids = [tokenizer(t).input_ids for t in ("", f"{text}<audio><3_0><5_1><7_2><255_3></audio>{text}")]
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    tokens = torch.randint(len(tokenizer), (1, 200), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)  # initial models ignore positions almost completely
        found.append((ids, special, tokenizer.decode(ids[1]), str(model.dtype), model(tokens).logits))
torch.save(found, output)
"""


CHECK = """
import sys, torch, transformers
version, output, *words = sys.argv[1:]
assert transformers.__version__.startswith(version), transformers.__version__
"""


def run_in_both(script, tmp_path, *words):
    """Run a script in transformers 4.56.2 and 5.x with arguments `words`; return what each run saved to `output`."""
    for version, python in (("4.56.2", ALONE), ("5.", [sys.executable])):
        command = [*python, "-c", CHECK + script, version, tmp_path / version, *words]
        result = subprocess.run(list(map(str, command)), text=True, capture_output=True, timeout=1200)
        assert result.returncode == 0, result.stderr
    return torch.load(tmp_path / "4.56.2"), torch.load(tmp_path / "5.")


@pytest.mark.slow
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
    of_4, of_5 = run_in_both(READ, tmp_path, *folders)
    for folder, (*a, logits_4), (*b, logits_5) in zip(folders, of_4, of_5, strict=True):
        assert a == b, folder
        assert logits_5.abs().max() > 1, "differences would show"
        torch.testing.assert_close(logits_4, logits_5, atol=1e-5, rtol=0, msg=str(folder))


CONTINUE = """
import re, numpy
from transformers import AutoFeatureExtractor, AutoModelForCausalLM, AutoTokenizer, MimiModel, StoppingCriteria
folder, codec_folder, prompt = words

class AtEnd(StoppingCriteria):
    def __call__(self, ids, scores, **kwargs):
        return ids[0, -1].item() == end
model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
levels, tokenizer = model.config.num_quantizers, AutoTokenizer.from_pretrained(folder)
(end,) = tokenizer("</audio>", add_special_tokens=False).input_ids
codec, features = MimiModel.from_pretrained(codec_folder), AutoFeatureExtractor.from_pretrained(codec_folder)
samples = numpy.load(prompt)
inputs = features(raw_audio=samples, sampling_rate=features.sampling_rate, return_tensors="pt").to(codec.device)
with torch.no_grad():
    codes = codec.encode(inputs["input_values"], inputs["padding_mask"], num_quantizers=levels).audio_codes
text = "".join(f"<{code}_{level}>" for frame in codes[0].T.tolist() for level, code in enumerate(frame))
inputs = tokenizer("<audio>" + text, return_tensors="pt").to(model.device)
with torch.no_grad():
    ids = model.generate(**inputs, max_length=121, do_sample=False, stopping_criteria=[AtEnd()])
units = [int(code) for code, _ in re.findall(r"<(\\d+)_(\\d+)>", tokenizer.decode(ids[0]))]
frames = torch.tensor(units[: len(units) // levels * levels]).view(1, -1, levels)
torch.save((frames[0], codec.decode(frames.transpose(1, 2))[0][0, 0]), output)
"""


@pytest.mark.slow
def test_the_calls_of_the_released_card_run_in_both(tmp_path):
    """The code in the model card needs a feature extractor for the codec, and correct input names of the tokenizer."""
    folder = convert(tmp_path, "factor 32")
    samples_S = read_audio(TINY / "prompt.wav", 24_000).samples_S[: 10 * 1920]
    np.save(tmp_path / "prompt.npy", samples_S.numpy())
    (codes_4_TQ, audio_4_S), (codes_5_TQ, audio_5_S) = run_in_both(
        CONTINUE, tmp_path, folder, TINY / "mimi", tmp_path / "prompt.npy"
    )
    assert torch.equal(codes_4_TQ, codes_5_TQ) and len(codes_4_TQ) > 10
    torch.testing.assert_close(audio_4_S[: 10 * 1920], audio_5_S[: 10 * 1920], atol=1e-5, rtol=0)
    assert torch.equal(MimiCodec(str(TINY / "mimi"), 4).encode_as_released(samples_S), codes_4_TQ[:10])


FRAMES = """
import numpy
from transformers import AutoTokenizer, CsmForConditionalGeneration
folder, prompt = words
model, info = CsmForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
assert not any(info.values()), info
samples = torch.from_numpy(numpy.load(prompt))
inputs = AutoTokenizer.from_pretrained(folder)("<audio>" + "<0_0>" * 10, return_tensors="pt")
spoken = {"input_values": samples[None, None], "input_values_cutoffs": torch.tensor([[len(samples)]])}
with torch.no_grad():
    logits = model(**inputs, **spoken).logits
frames = model.generate(**inputs, **spoken, do_sample=False, depth_decoder_do_sample=False, max_new_tokens=20)
torch.save((logits, frames[0]), output)
"""


@pytest.mark.slow
def test_a_hierarchical_model_continues_speech_in_both(tmp_path):
    folder = convert(tmp_path, "factor 32", tied=False, architecture="hierarchical")
    samples_S = read_audio(TINY / "prompt.wav", 24_000).samples_S[: 10 * 1920]
    np.save(tmp_path / "prompt.npy", samples_S.numpy())
    (logits_4, frames_4_TQ), (logits_5, frames_5_TQ) = run_in_both(FRAMES, tmp_path, folder, tmp_path / "prompt.npy")
    torch.testing.assert_close(logits_4, logits_5, atol=1e-5, rtol=0)
    assert torch.equal(frames_4_TQ, frames_5_TQ)


ENCODE = """
from transformers import MimiModel
samples_S, codes_TQ = torch.load(words[1])
codec = MimiModel.from_pretrained(words[0]).eval()
with torch.no_grad():
    codes = codec.encode(samples_S[None, None], num_quantizers=8).audio_codes[0].T
    audio = codec.decode(codes_TQ.T[None]).audio_values[0, 0]
torch.save((codes, audio), output)
"""


@pytest.mark.slow
def test_transformers_4_has_no_window(tmp_path):
    """Without the sliding window, codes and audio equal those of transformers before February 2026."""
    samples_S = read_audio(TINY / "prompt.wav", 24_000).samples_S[
        : 20 * 1920
    ]  # longer than the window of this codec, 1 s
    windowed, whole = (MimiCodec(str(TINY / "mimi"), 8, sliding_window=window) for window in (True, False))
    codes_TQ = windowed.encode_as_released(samples_S)
    torch.save((samples_S, codes_TQ), tmp_path / "inputs")
    (codes_4_TQ, audio_4_S), _ = run_in_both(ENCODE, tmp_path, TINY / "mimi", tmp_path / "inputs")
    assert torch.equal(whole.encode_as_released(samples_S), codes_4_TQ) and not torch.equal(codes_TQ, codes_4_TQ)
    torch.testing.assert_close(whole.decode(codes_TQ), audio_4_S, atol=1e-6, rtol=0)
    assert not torch.allclose(windowed.decode(codes_TQ), audio_4_S, atol=1e-3)
