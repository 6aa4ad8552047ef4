"""Load configurations, tokenizers and weights from a folder or the Hugging Face Hub."""

import hashlib
import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from llama_mimi.common.errors import UserError, first_line
from llama_mimi.common.files import visible_files


def load_pretrained(
    cls: Any, name: str, *, what: str, allow_torch_weights: bool = False, without_effect: str = "(?!)", **kwargs: Any
) -> Any:
    """Load ``cls.from_pretrained(name)`` without pickled weights and without code from the folder.

    A model (``dtype`` is given) must have exactly the tensors of its class, in their shapes: transformers only warns
    when it initialises missing ones at random. Exempt are tied weights, keys that the class exempts, and buffers.

    Args:
        allow_torch_weights: read ``.bin`` files if there are no safetensors (PyTorch loads weights only).
        without_effect: regular expression of further tensors that may be wrong.
    """
    path = Path(name)
    if not path.is_dir() and (path.parent.is_dir() or not re.fullmatch(r"\w+([.-]\w+)*/\w+([.-]\w+)*", name)):
        remedy = f"check the path, name a hub id (owner/name), or fetch it with `hf download {name} --local-dir {name}`"
        raise UserError(f"the {what} folder '{name}' does not exist; {remedy}")
    if is_model := "dtype" in kwargs:
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        kwargs["use_safetensors"] = None if allow_torch_weights else True
    load_report = logging.getLogger("transformers.modeling_utils")  # a table of tensors, which are checked here
    load_report.disabled = True
    try:
        loaded = cls.from_pretrained(name, trust_remote_code=False, **kwargs)
    except Exception as error:  # damaged files raise whatever their parser does
        remedy = f"copy the folder again, or name another {what}"
        if not path.is_dir():
            licence = "if the model is gated, accept its licence on its page and run `hf auth login`"
            remedy = f"there is no such folder: check the path; {licence}; or fetch it with `hf download {name}`"
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
    require_no_difference(wrong, f"'{name}' is not a whole {what}", type(model).__name__)
    return model


def require_no_difference(wrong: Mapping[str, Collection[str]], problem: str, model: str) -> None:
    """Raise a `UserError` with ``problem`` if there are wrong tensors; ``wrong`` maps the kind of a fault to names."""
    if parts := "; ".join(f"{len(keys)} {kind}, first '{min(keys)}'" for kind, keys in wrong.items() if keys):
        problem += f": its tensors are not those of the {model} in its config.json ({parts})"
        raise UserError(f"{problem}; copy or convert the folder again, or name another")


def weights_sha256(name: str) -> str:
    """Return the SHA-256 of the safetensors (or else ``.bin``) files of a folder, or of a cached hub id."""
    folder = Path(name)
    if not folder.is_dir():
        folder = Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.bin"], local_files_only=True))
    digest = hashlib.sha256()
    for path in visible_files(folder, "*.safetensors") or visible_files(folder, "*.bin"):
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
