"""The upload of a converted model to the hub. `transformers` loads the uploaded files."""

import json
from pathlib import Path

import pytest
import torch
from conftest import TINY
from huggingface_hub import HfApi, ModelCard
from push_to_hub import Upload, push_to_hub
from test_report import generations_file, result_file
from transformers import AutoTokenizer, LlamaForCausalLM

from llama_mimi.common.errors import UserError
from llama_mimi.common.hub import weights_sha256


@pytest.fixture
def model(model_folder, tmp_path):
    """A converted model with all files that conversion writes."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for path in model_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "README.md").write_text(
        "---\nlibrary_name: transformers\ntags: [mimi]\n---\n\n# mine\n\nHow to use it.\n| codec | `/home/me/mimi` |\n"
    )
    training = {
        "training": {"dataset": "data/codes/x,/home/me/codes/y/,file:///home/me/z", "steps": 7},
        "loss": {"level_weights": "uniform"},
        "data": {"packing": "a/b", "others": ["~/me/p", "../../home/me/q, r", "hf://me/s", "/"]},
    }
    (folder / "training_config.json").write_text(json.dumps(training))
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "/home/me/base"}')
    return folder


def test_a_dry_run_writes_what_would_be_uploaded(model, tmp_path, capsys):
    of_model, sha256 = tmp_path / "results", weights_sha256(str(model))
    part = {"lexical_dev": [1.0, 1.0, 1.0, 0.0]}
    result_file(of_model, "mine", part, "sLM21", model_sha256=sha256, data_kind="synthetic")
    result_file(of_model, "other", part, "sLM21")
    generations_file(of_model, "mine", {"a": [0.4], "b": [0.6]}, made_by={"model_sha256": sha256})
    (of_model / "other.json").write_text(json.dumps({"made_by": "tool 1.0"}))  # from another program
    for path in (model / "._model.safetensors", of_model / "._a.json"):
        path.write_bytes(b"\x00\x05\x16\x07\xff")  # macOS writes such files
    of_weights = {"license": "llama3.2", "base_model": "meta-llama/Llama-3.2-1B"}
    push_to_hub(Upload(model, "me/mine", (of_model,), dry_run=tmp_path / "dry", **of_weights))
    assert "would be uploaded: README.md, adapter/adapter_config.json, config.json" in capsys.readouterr().out
    assert not list((tmp_path / "dry").glob(".*"))
    adapter = json.loads((tmp_path / "dry/adapter/adapter_config.json").read_text())
    assert adapter == {"base_model_name_or_path": "base"}
    card = ModelCard.load(tmp_path / "dry" / "README.md")
    assert card.data.license == "llama3.2" and card.data.base_model == "meta-llama/Llama-3.2-1B"
    assert "How to use it." in card.content and card.data.library_name == "transformers"
    assert "\n## Training\n" in card.content and "| `training.dataset` | `data/codes/x,y,z` |" in card.content
    assert "| `training.steps` | `7` |" in card.content
    assert "\n## Accuracy, preset official\n" in card.content
    assert "measure (synthetic data) | mine |\n| --- | --- |\n| sWUGGY (n = 4) | 75.0 (30.1 to 95.4) |" in card.content
    assert "| speaker similarity (n = 2) | 0.500 (-0.771 to 1.771) |" in card.content
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "dry")
    assert torch.isfinite(loaded(torch.tensor([[0, 1]])).logits).all()
    assert "<audio>" in AutoTokenizer.from_pretrained(tmp_path / "dry").get_vocab()
    with pytest.raises(FileExistsError):
        push_to_hub(Upload(model, "me/mine", (of_model,), dry_run=tmp_path / "dry"))


def test_an_upload_sends_the_folder_and_the_card(model, tmp_path, monkeypatch, capsys):
    sent = []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo, **options: sent.append((repo, options)))
    monkeypatch.setattr(HfApi, "create_commit", lambda self, repo, operations, **options: sent.append(operations))
    push_to_hub(Upload(model, "me/mine", (), private=True, base_model="/home/me/base"))
    created, operations = sent
    assert created == ("me/mine", {"private": True, "exist_ok": True})
    texts = {operation.path_in_repo: operation.path_or_fileobj for operation in operations}
    assert texts.keys() == {str(path.relative_to(model)) for path in model.rglob("*") if path.is_file()}
    assert texts["model.safetensors"] == str(model / "model.safetensors")
    assert b"# mine" in texts["README.md"] and b'"codec": "mimi"' in texts["config.json"]
    training = json.loads(texts["training_config.json"])
    assert training["training"] == {"dataset": "data/codes/x,y,z", "steps": 7}
    assert training["data"] == {"packing": "a/b", "others": ["p", "q, r", "hf://me/s", "/"]}
    assert b"/home" not in texts["README.md"] and b"| codec | `mimi` |" in texts["README.md"]
    assert "https://huggingface.co/me/mine" in capsys.readouterr().out


def test_mistakes(model, monkeypatch):
    def refused(*args, **options):
        raise OSError("no network")

    monkeypatch.setattr(HfApi, "create_repo", refused)
    for folder, results, message in (
        (model, (), "the upload to 'me/mine' failed .no network.*--dry_run"),
        (TINY, (), "is not a converted model"),
        (model, (Path("nowhere"),), "'nowhere' does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            push_to_hub(Upload(folder, "me/mine", results))
