"""Functions that load configurations, tokenizers and weights from a folder or the Hugging Face Hub."""

import hashlib
import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers.utils.logging import set_tqdm_hook

from llama_mimi.common.command_line import is_first_rank
from llama_mimi.common.errors import UserError, first_line
from llama_mimi.common.files import visible_files


def load_pretrained(
    cls: Any, name: str, *, what: str, allow_torch_weights: bool = False, without_effect: str = "(?!)", **kwargs: Any
) -> Any:
    """Return ``cls.from_pretrained(name)``, without reading pickled weights or running code from the folder.

    ``dtype`` is given if ``cls`` is a model. The folder must then contain exactly the tensors of this model, except for
    tied weights and buffers. transformers itself only warns of missing tensors, and initialises them at random.

    Args:
        allow_torch_weights: read ``.bin`` files if safetensors are missing. PyTorch does not run code from these files.
        without_effect: regular expression; tensors with a matching name are not checked.
    """
    path = Path(name)
    if not path.is_dir() and (path.parent.is_dir() or not re.fullmatch(r"\w+([.-]\w+)*/\w+([.-]\w+)*", name)):
        remedy = f"check the path, use a hub id (owner/name), or run `hf download {name} --local-dir {name}`"
        raise UserError(f"the {what} folder '{name}' does not exist; {remedy}")
    if is_model := "dtype" in kwargs:
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        kwargs["use_safetensors"] = None if allow_torch_weights else True
    # Only rank 0 shows a progress bar, after two seconds of work.
    set_tqdm_hook(lambda create, args, options: create(*args, **options, delay=2, disable=not is_first_rank()))
    load_report = logging.getLogger("transformers.modeling_utils")  # prints a table; the tensors are checked below
    load_report.disabled = True
    try:
        loaded = cls.from_pretrained(name, trust_remote_code=False, **kwargs)
    except Exception as error:  # the type of the error depends on the parser
        remedy = f"copy the folder again, or choose another {what}"
        if not path.is_dir():
            remedy = "check the name and the network; for a gated model, first run `uv run hf auth login`; or run "
            remedy += f"`uv run hf download {name} --local-dir FOLDER` and use the folder instead of the hub id"
        problem = f"the {what} in '{name}' could not be loaded ({first_line(error)})"
        raise UserError(f"{problem}; {remedy}") from error
    finally:
        load_report.disabled = False
    if not is_model:
        return loaded
    model, info = loaded
    wrong = {
        "missing": info["missing_keys"],
        "unexpected": set(info["unexpected_keys"]) - {buffer for buffer, _ in model.named_buffers()},
        "of another shape": [key for key, *_ in info["mismatched_keys"]],
    }
    wrong = {kind: [key for key in keys if not re.search(without_effect, key)] for kind, keys in wrong.items()}
    require_no_difference(wrong, f"'{name}' is not a complete {what}", type(model).__name__)
    return model


def require_no_difference(wrong: Mapping[str, Collection[str]], problem: str, model: str) -> None:
    """If ``wrong`` contains tensor names (grouped by fault), raise a `UserError` that begins with ``problem``."""
    if parts := "; ".join(f"{len(keys)} {kind}, first '{min(keys)}'" for kind, keys in wrong.items() if keys):
        problem += f": the tensors do not match the {model} in config.json ({parts})"
        raise UserError(f"{problem}; copy or convert the folder again, or choose another folder")


def weights_sha256(name: str) -> str:
    """Return the SHA-256 of the weights (safetensors, else ``.bin`` files) in a folder, or in the cache of a hub id."""
    folder = Path(name)
    if not folder.is_dir():
        folder = Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.bin"], local_files_only=True))
    digest = hashlib.sha256()
    for path in visible_files(folder, "*.safetensors") or visible_files(folder, "*.bin"):
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
