"""A converted model on the hub, with a card that says how it was made and how it scored."""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from llama_mimi.audio.mimi import codec_hash, local_codec
from llama_mimi.checkpoint.architectures import load_config
from llama_mimi.checkpoint.conversion import TRAINING_CONFIG
from llama_mimi.common.errors import UserError, first_line
from llama_mimi.common.files import parse_json, read_json, visible_files
from llama_mimi.common.hub import weights_sha256
from llama_mimi.judging.table import column_of
from llama_mimi.study.registry import INDEX

CARD = "README.md"
CONFIGS = ("config.json", TRAINING_CONFIG)
PRESETS = ("official", "original")  # whose accuracies stand in the card's metadata, too
# Settings that a card names, and what it calls them.
SETTINGS = {
    "training.dataset": "data",
    "training.steps": "steps",
    "training.global_batch_size": "rows a step",
    "training.seq_len": "positions a row",
    "data.packing": "packing",
    "data.max_audio_seconds": "longest clip (s)",
    "loss.level_weights": "weights of the levels",
    "optimizer.lr": "learning rate",
    "lr_scheduler.decay_ratio": "share of decay",
    "debug.seed": "seed",
}


@dataclass(frozen=True)
class PublishingOptions:
    """Flags of scripts/push_to_hub.py."""

    model_name: Path
    """Folder that scripts/convert_dcp_to_hf.py has made"""

    repo: str
    """Where to: owner/name on the hub"""

    results: tuple[Path, ...] = ()
    """Folders with results of eval/ or of a study; those of this model's weights stand in its card"""

    dry_run: Path | None = None
    """Write what would be uploaded into this folder, which must not exist, and upload nothing"""

    private: bool = False
    """A new repository is private"""

    license: str | None = None
    """Of the weights, as the hub calls it, such as llama3.2 for what began with Llama 3.2"""

    base_model: str | None = None
    """Hub id of the model that training began with"""


def publish(options: PublishingOptions) -> None:
    """Upload a converted model.

    Raises:
        UserError: no converted model, a result that cannot be read, or the hub refuses.
    """
    try:
        validate_repo_id(options.repo)
    except HFValidationError as error:
        raise UserError(f"--repo is '{options.repo}', which is no owner/name ({first_line(error)})") from error
    if options.repo.count("/") != 1:
        raise UserError(f"--repo is '{options.repo}'; name it as owner/name")
    texts = {CARD: write_card(options)}
    for name in CONFIGS:
        if (config := read_json(str(options.model_name), name)) is not None:
            texts[name] = json.dumps(without_folders(config), indent=2) + "\n"
    files = [path for path in visible_files(options.model_name, "*") if path.is_file() and path.name not in texts]
    if options.dry_run is not None:
        return _write(options.dry_run, files, texts)
    api = HfApi()
    try:
        api.create_repo(options.repo, private=options.private, exist_ok=True)
        names = [path.name for path in files]
        api.upload_folder(repo_id=options.repo, folder_path=options.model_name, allow_patterns=names)
        for name, text in texts.items():
            api.upload_file(repo_id=options.repo, path_or_fileobj=text.encode(), path_in_repo=name)
    except (OSError, HfHubHTTPError) as error:  # no network and no login are of the first kind
        raise UserError(
            f"'{options.model_name}' could not be uploaded to '{options.repo}' ({first_line(error)}); log in with "
            "`hf auth login`, or see with --dry_run FOLDER what would be"
        ) from error
    print(f"{options.model_name} -> https://huggingface.co/{options.repo}")


def without_folders(value: Any) -> Any:
    """Return JSON with the name alone of each local path: the folders of this machine are not uploaded.

    Local are absolute paths and those with ``~``, ``..`` or ``file://``, also in a list with commas.
    """
    if isinstance(value, dict):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_folders(item) for item in value]
    if not isinstance(value, str):
        return value
    items = []
    for item in value.split(","):
        path = item.strip()
        is_local = path.startswith(("/", "~")) or "file://" in path or ".." in Path(path).parts
        items.append((Path(path).name or path) if is_local else item)
    return ",".join(items)


def _write(folder: Path, files: Sequence[Path], texts: Mapping[str, str]) -> None:
    if folder.exists():
        raise UserError(f"--dry_run is '{folder}', which exists; name a new folder")
    try:
        folder.mkdir(parents=True)
        for path in files:
            shutil.copyfile(path, folder / path.name)
        for name, text in texts.items():
            (folder / name).write_text(text)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(
            f"--dry_run '{folder}' could not be written ({error.strerror}); free disk space, or name another folder"
        ) from error
    names = ", ".join(sorted(path.name for path in folder.iterdir()))
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"would be uploaded: {names}; {size / 1e6:,.1f} MB, as they lie in {folder}")


def write_card(options: PublishingOptions) -> str:
    """The card of conversion with what is known of training and scores.

    Raises:
        UserError: no converted model, or a result that cannot be read.
    """
    model = options.model_name
    if not (model / CARD).is_file() or not visible_files(model, "*.safetensors"):
        raise UserError(f"'{model}' is no converted model; make one with scripts/convert_dcp_to_hf.py")
    config, _ = load_config(str(model), "model")
    codec = local_codec(config.codec, model) or config.codec
    sha256 = weights_sha256(str(model))
    reports, lines = _results_of(sha256, options.results)
    print(f"{len(reports)} results and {len(lines)} runs of studies are of these weights")
    card = ModelCard.load(model / CARD)
    card.data.model_name = options.repo.split("/")[1]
    card.data.license, card.data.base_model = options.license, without_folders(options.base_model)
    facts = {"weights (SHA-256)": f"`{sha256}`", "weights of the codec (SHA-256)": f"`{codec_hash(codec)}`"}
    facts |= _training(model)
    if lines:
        facts |= {"data (SHA-256)": f"`{lines[0]['data_sha256']}`", "training FLOPs": f"{lines[0]['flops']:.3g}"}
    content = re.sub(r"`([^`\n]+)`", lambda code: f"`{without_folders(code[1])}`", card.content)  # codec and checkpoint
    parts = [content.rstrip(), "## Training", _table(("", ""), facts.items())]
    scores = [
        (
            report["benchmark"],
            part,
            report["preset"],
            f"{100 * r['accuracy']:.1f} %",
            "{:.1f} to {:.1f} %".format(*(100 * x for x in r["interval"])),
            f"{r['count']:,}",
        )
        for report in reports
        for part, r in report.get("parts", {}).items()
    ]
    if scores:
        head = ("benchmark", "part", "preset", "accuracy", "95 % interval", "pairs, words or sentences")
        parts += ["## Scores", _table(head, scores)]
        card.data.eval_results = [
            EvalResult(
                task_type="audio-to-audio",
                dataset_type=report["benchmark"],
                dataset_name=f"{report['benchmark']} {part}",
                dataset_config=part,
                metric_name=f"accuracy ({report['preset']})",
                metric_type="accuracy",
                metric_value=round(100 * result["accuracy"], 2),
            )
            for report in reports
            if report.get("preset") in PRESETS
            for part, result in report["parts"].items()
        ]
    for report in reports:
        if "results" in report:
            rows = [_measure(name, result) for name, result in report["results"].items()]
            title = f"## Continuations of at most {report['seconds']:g} s"
            parts += [title, _table(("measure", "mean", "95 % interval", "prompts"), rows)]
    text = "\n\n".join(parts) + "\n"
    body = text.split("---\n", 2)[2] if text.startswith("---\n") else text
    return f"---\n{card.data.to_yaml()}\n---\n{body}"


def _measure(name: str, result: Mapping[str, Any]) -> list[str]:
    column = column_of(name)
    mean, low, high = (f"{value:.{column.digits}f}" for value in (result["mean"], *result["interval"]))
    return [column.heading, mean, f"{low} to {high}", f"{result['count']:,}"]


def _training(model: Path) -> dict[str, str]:
    config = without_folders(read_json(str(model), TRAINING_CONFIG) or {})
    found = {}
    for key, name in SETTINGS.items():
        section, _, setting = key.partition(".")
        if (value := config.get(section, {}).get(setting)) is not None:
            found[name] = str(value)
    return found


def _results_of(sha256: str, folders: Sequence[Path]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Results of benchmarks and of continuations, and lines of studies, that are of these weights."""
    reports, lines = [], []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"--results is '{folder}', which is no folder; name those of eval/ or of a study")
        for path in visible_files(folder, "**/*.json"):
            found = _read(path, path.read_bytes())
            if not isinstance(found, dict):
                continue
            made_by = found if "parts" in found else found.get("made_by")
            if isinstance(made_by, dict) and made_by.get("model_sha256") == sha256:
                reports.append(found)
        for path in visible_files(folder, f"**/{INDEX}"):
            of_file = [_read(path, line) for line in path.read_bytes().splitlines()]
            lines += [line for line in of_file if isinstance(line, dict) and line.get("model_sha256") == sha256]
    return reports, lines


def _read(path: Path, content: bytes) -> Any:
    try:
        return parse_json(content)
    except ValueError as error:
        raise UserError(
            f"'{path}' is not readable as JSON ({first_line(error)}); mend it, or name other --results"
        ) from error


def _table(head: Sequence[str], rows: Any) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
