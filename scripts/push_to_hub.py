"""Upload a converted model to the hub, with a model card that shows the training settings and the scores.

uv run python scripts/push_to_hub.py --model_name models/tiny --repo me/tiny --results results --dry_run outputs/upload
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_mimi.common.command_line import command
from llama_mimi.common.errors import UserError, first_line
from llama_mimi.common.files import read_json, visible_files

CARD = "README.md"
# Training settings that the card shows.
SETTINGS = """training.dataset training.steps training.global_batch_size training.seq_len data.packing
    data.max_audio_seconds loss.level_weights optimizer.lr lr_scheduler.decay_ratio debug.seed""".split()


@dataclass(frozen=True)
class Upload:
    """A converted model, and its repository on the hub."""

    model_name: Path  # output folder of scripts/convert_dcp_to_hf.py
    repo: str  # repository on the hub, as owner/name
    # folders with results of eval/ or of a study; the card shows only results of this model; default: no results
    results: tuple[Path, ...] = ()
    dry_run: Path | None = None  # new folder; the files are written to this folder and are not uploaded
    private: bool = False  # make a new repository private
    license: str | None = None  # license of the weights in the model card, such as 'llama3.2'
    base_model: str | None = None  # hub id of the model that training started from


def push_to_hub(upload: Upload) -> None:
    """Upload a converted model."""
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    from llama_mimi.checkpoint.conversion import TRAINING_CONFIG
    from llama_mimi.checkpoint.lora import ADAPTER_CONFIG

    model_name, repo, dry_run = upload.model_name, upload.repo, upload.dry_run
    card = write_card(model_name, upload.results)
    base_model = without_folders(upload.base_model)
    vars(card.data).update(model_name=repo.split("/")[-1], license=upload.license, base_model=base_model)
    paths = [*visible_files(model_name, "*"), *visible_files(model_name, "adapter/*")]
    files: dict[str, Path | bytes] = {str(p.relative_to(model_name)): p for p in paths if p.is_file()}
    for name in ("config.json", TRAINING_CONFIG, f"adapter/{ADAPTER_CONFIG}"):
        if config := read_json(str(model_name), name):
            files[name] = (json.dumps(without_folders(config), indent=2) + "\n").encode()
    files[CARD] = card.content.encode()
    if dry_run is not None:
        dry_run.mkdir(parents=True)
        for name, content in files.items():
            (dry_run / name).parent.mkdir(exist_ok=True)
            (dry_run / name).write_bytes(content.read_bytes() if isinstance(content, Path) else content)
        return print(f"these files in '{dry_run}' would be uploaded: {', '.join(sorted(files))}")
    api = HfApi()
    try:
        api.create_repo(repo, private=upload.private, exist_ok=True)
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        api.create_commit(repo, operations, commit_message="Upload a converted model")
    except (OSError, ValueError, HfHubHTTPError) as error:  # no network, a refused name, or no login
        remedy = "log in with `hf auth login`, or check the upload with --dry_run"
        raise UserError(f"the upload to '{repo}' failed ({first_line(error)}); {remedy}") from error
    print(f"{model_name} -> https://huggingface.co/{repo}")


def without_folders(value: Any) -> Any:
    """Shorten the local paths in a JSON value to their last component, to hide the folders of this machine.

    A local path is absolute, begins with ``~``, or contains ``..`` or ``file://``. A string can contain several paths,
    separated by commas.
    """
    if isinstance(value, dict):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_folders(item) for item in value]
    if isinstance(value, str) and "," in value:
        return ",".join(map(without_folders, value.split(",")))
    path = value.strip() if isinstance(value, str) else ""
    is_local = path.startswith(("/", "~")) or "file://" in path or ".." in Path(path).parts
    return Path(path).name or path if is_local else value


def write_card(model: Path, folders: Sequence[Path]) -> Any:
    """Return a model card with the training settings and the results. Results of other models are left out."""
    from huggingface_hub import ModelCard

    from llama_mimi.audio.mimi import codec_hash, local_codec
    from llama_mimi.checkpoint.architectures import load_config
    from llama_mimi.checkpoint.conversion import TRAINING_CONFIG
    from llama_mimi.common.hub import weights_sha256
    from llama_mimi.report.comparisons import comparable_sets, summary
    from llama_mimi.report.document import Section, Table, to_markdown
    from llama_mimi.report.results import read_results

    if not (model / CARD).is_file() or not visible_files(model, "*.safetensors"):
        raise UserError(f"'{model}' is not a converted model; convert a checkpoint with scripts/convert_dcp_to_hf.py")
    config, _ = load_config(str(model), "model")
    sha256, codec = weights_sha256(str(model)), local_codec(config.codec, model) or config.codec
    facts = {"weights (SHA-256)": f"`{sha256}`", "weights of the codec (SHA-256)": f"`{codec_hash(codec)}`"}
    training = without_folders(read_json(str(model), TRAINING_CONFIG) or {})
    for section, setting in (key.split(".") for key in SETTINGS):
        if (value := training.get(section, {}).get(setting)) is not None:
            facts[f"`{section}.{setting}`"] = f"`{value}`"
    items = read_results(folders)
    sections = [Section("Training", tables=[Table(("", ""), list(facts.items()))])]
    sections += [summary(some, title) for title, some in comparable_sets(items[items["weights"] == sha256])]
    card = ModelCard.load(model / CARD)
    text = re.sub(r"`([^`\n]+)`", lambda match: f"`{without_folders(match[1])}`", card.text.strip())
    card.text = f"\n{text}\n\n#{to_markdown(sections)}"  # one level below the title of the card
    return card


if __name__ == "__main__":
    with command(Upload, __doc__) as options:
        push_to_hub(options)
