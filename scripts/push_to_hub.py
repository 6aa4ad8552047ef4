"""Upload a converted model to the hub, with a card of its training and its scores.

    uv run python scripts/push_to_hub.py --model_name models/tiny --repo me/tiny \\
        --results results --dry_run outputs/tiny_on_the_hub

With --dry_run nothing is uploaded.
"""

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError

from llama_mimi.audio.mimi import codec_hash, local_codec
from llama_mimi.checkpoint.architectures import load_config
from llama_mimi.checkpoint.conversion import TRAINING_CONFIG
from llama_mimi.common.command_line import run_command
from llama_mimi.common.errors import UserError, first_line
from llama_mimi.common.files import parse_json, read_json, visible_files
from llama_mimi.common.hub import weights_sha256

CARD = "README.md"
PRESETS = ("official", "original")  # only their accuracies are in the card's metadata
# Settings of training that a card shows.
SETTINGS = """training.dataset training.steps training.global_batch_size training.seq_len data.packing
    data.max_audio_seconds loss.level_weights optimizer.lr lr_scheduler.decay_ratio debug.seed""".split()


def push_to_hub(
    model_name: Path,
    repo: str,
    results: tuple[Path, ...] = (),
    dry_run: Path | None = None,
    private: bool = False,
    license: str | None = None,
    base_model: str | None = None,
) -> None:
    """Upload a converted model.

    Args:
        model_name: folder that scripts/convert_dcp_to_hf.py has written
        repo: repository on the hub, as owner/name
        results: folders with results of eval/ or of a study; the card shows those of this model's weights
        dry_run: write the upload into this new folder instead
        private: make a new repository private
        license: license of the weights on the hub, such as llama3.2
        base_model: hub id of the model that training started from

    Raises:
        UserError: the folder is not a converted model, a result cannot be read, or the hub refuses.
    """
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo):
        raise UserError(f"--repo is '{repo}'; name it as owner/name")
    metadata = {"model_name": repo.split("/")[1], "license": license, "base_model": without_folders(base_model)}
    texts = {CARD: write_card(model_name, results, metadata)}
    for name in ("config.json", TRAINING_CONFIG):
        if (config := read_json(str(model_name), name)) is not None:
            texts[name] = json.dumps(without_folders(config), indent=2) + "\n"
    files = [path for path in visible_files(model_name, "*") if path.is_file() and path.name not in texts]
    if dry_run is not None:
        if dry_run.exists():
            raise UserError(f"--dry_run is '{dry_run}', which exists; name a new folder")
        dry_run.mkdir(parents=True)
        for path in files:
            shutil.copyfile(path, dry_run / path.name)
        for name, text in texts.items():
            (dry_run / name).write_text(text)
        return print(f"would be uploaded: {', '.join(sorted([*texts, *(path.name for path in files)]))}; see {dry_run}")
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=model_name, allow_patterns=[path.name for path in files])
        for name, text in texts.items():
            api.upload_file(repo_id=repo, path_or_fileobj=text.encode(), path_in_repo=name)
    except (OSError, ValueError, HfHubHTTPError) as error:  # no network, a name that the hub refuses, no login
        problem = f"'{model_name}' could not be uploaded to '{repo}' ({first_line(error)})"
        raise UserError(f"{problem}; log in with `hf auth login`, or look at the upload with --dry_run") from error
    print(f"{model_name} -> https://huggingface.co/{repo}")


def without_folders(value: Any) -> Any:
    """Return JSON in which a local path is its last component, so that no folder of this machine is uploaded.

    A local path is absolute or contains ``~``, ``..`` or ``file://``. Lists with commas are searched too.
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


def write_card(model: Path, folders: Sequence[Path], metadata: dict[str, Any]) -> str:
    """Return the card that conversion wrote, with the facts of training and the results of these weights."""
    if not (model / CARD).is_file() or not visible_files(model, "*.safetensors"):
        raise UserError(f"'{model}' is not a converted model; make one with scripts/convert_dcp_to_hf.py")
    config, _ = load_config(str(model), "model")
    sha256, codec = weights_sha256(str(model)), local_codec(config.codec, model) or config.codec
    facts = {"weights (SHA-256)": f"`{sha256}`", "weights of the codec (SHA-256)": f"`{codec_hash(codec)}`"}
    training = without_folders(read_json(str(model), TRAINING_CONFIG) or {})
    for section, setting in (key.split(".") for key in SETTINGS):
        if (value := training.get(section, {}).get(setting)) is not None:
            facts[f"{section}.{setting}"] = str(value)
    scores, evaluations = [], []
    for path, result in results_of(sha256, folders):
        try:
            if "flops" in result:  # a line of a study's index
                facts |= {"data (SHA-256)": f"`{result['data_sha256']}`", "training FLOPs": f"{result['flops']:.3g}"}
            for name, rule, mean, low, high, count in scores_of(result):
                scores.append((name, rule, f"{mean:.4g}", f"{low:.4g} to {high:.4g}", f"{count:,}"))
                if rule in PRESETS:
                    benchmark, part = name.split("/")
                    score = EvalResult(
                        "audio-to-audio", benchmark, name, "accuracy", round(mean, 2), dataset_config=part
                    )
                    evaluations.append(replace(score, metric_name=f"accuracy ({rule})"))
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise UserError(f"'{path}' is not a complete result ({error!r}); make it again or remove it") from error
    card = ModelCard.load(model / CARD)
    text = re.sub(r"`([^`\n]+)`", lambda match: f"`{without_folders(match[1])}`", card.text.strip())
    parts = ["", text, "## Training", table(("", ""), facts.items())]
    if scores:
        head = ("measure (accuracies in percent)", "preset or length", "mean", "95 % interval", "count")
        parts += ["## Scores", table(head, scores)]
    vars(card.data).update(metadata | {"eval_results": evaluations or None})
    card.text = "\n\n".join(parts) + "\n"
    return card.content


def scores_of(result: dict[str, Any]) -> list[tuple[str, str, float, float, float, int]]:
    """Return measure, preset or length, mean, both limits of the interval, and number of pairs or prompts."""
    if "made_by" in result:
        means = import_module("llama_mimi.report.results").generation_means(result)
        return [(measure, f"at most {result['seconds']:g} s", *values) for measure, values in means.items()]
    rows = []
    for part, score in result.get("parts", {}).items():
        mean, low, high = (100 * value for value in (score["accuracy"], *score["interval"]))
        rows.append((f"{result['benchmark']}/{part}", result["preset"], mean, low, high, score["count"]))
    return rows


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))


def results_of(sha256: str, folders: Sequence[Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the results and the lines of study indices that are of these weights, with their files."""
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"--results is '{folder}', which is not a folder; name those of eval/ or of a study")
        for path in (*visible_files(folder, "**/*.json"), *visible_files(folder, "**/index.jsonl")):
            content = path.read_bytes()
            for text in content.splitlines() if path.suffix == ".jsonl" else [content]:
                try:
                    value = parse_json(text)
                except ValueError as error:
                    why = first_line(error)
                    raise UserError(f"'{path}' is not readable as JSON ({why}); fix or remove it") from error
                made_by = value.get("made_by", value) if isinstance(value, dict) else None
                if isinstance(made_by, dict) and made_by.get("model_sha256") == sha256:
                    yield path, value


if __name__ == "__main__":
    run_command(push_to_hub, __doc__)
