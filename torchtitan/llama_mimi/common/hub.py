"""Load configurations, tokenizers and weights from a folder or the Hugging Face Hub."""

import hashlib
import logging
import re
from collections.abc import Set
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from llama_mimi.common.errors import UserError, first_line
from llama_mimi.common.files import visible_files


def load_pretrained(
    cls: Any, name: str, *, what: str, allow_torch_weights: bool = False, without_effect: str = "(?!)", **kwargs: Any
) -> Any:
    """Load ``cls.from_pretrained(name)`` without pickled weights and without code from the folder.

    A model (``dtype`` is given) must have exactly the tensors of its class, in their shapes: transformers only warns
    when it initialises missing ones at random. Exempt are tied weights, keys that the class exempts, and buffers.

    Args:
        name: hub id or folder.
        what: noun for messages.
        allow_torch_weights: read ``.bin`` files if there are no safetensors (PyTorch loads weights only).
        without_effect: regular expression of further tensors that may be missing or unexpected.

    Raises:
        UserError: the folder or hub model is missing, gated, unreachable, damaged, or of another kind.
    """
    _check_name(name, what)
    if is_model := "dtype" in kwargs:
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        kwargs["use_safetensors"] = None if allow_torch_weights else True
    load_report = logging.getLogger("transformers.modeling_utils")  # a table of tensors, which are checked here
    load_report.disabled = True
    try:
        loaded = cls.from_pretrained(name, trust_remote_code=False, **kwargs)
    except Exception as error:  # damaged files raise whatever their parser does
        reason = first_line(error)
        if Path(name).is_dir():
            problem = f"the {what} in '{name}' could not be loaded: {reason}"
            raise UserError(f"{problem}; copy the folder again or name another {what}") from error
        raise UserError(
            f"the folder '{name}' does not exist, and the {what} could not be loaded from the Hugging Face Hub "
            f"({reason}); check the path; if the hub's model is gated, accept its licence on its page and run "
            f"`hf auth login`; without a network, download it elsewhere with `hf download {name} --local-dir FOLDER`"
        ) from error
    finally:
        load_report.disabled = False
    if not is_model:
        return loaded
    model, info = loaded
    exempt = re.compile(without_effect)
    missing = {key for key in info["missing_keys"] if not exempt.search(key)}
    unexpected = {key for key in info["unexpected_keys"] if not exempt.search(key)}
    unexpected -= {buffer for buffer, _ in model.named_buffers()}
    reshaped = {key for key, *_ in info["mismatched_keys"]}
    require_no_difference(missing, unexpected, reshaped, f"'{name}' is not a whole {what}", type(model).__name__)
    return model


def _check_name(name: str, what: str) -> None:
    """Refuse a folder that does not exist or has no model, before the hub is asked."""
    path = Path(name)
    if path.is_dir():
        if not any((path / file).is_file() for file in ("config.json", "tokenizer_config.json")):
            raise UserError(f"'{name}' has no {what} (no config.json in it); name a Hugging Face model folder")
        return
    missing = f"the {what} folder '{name}' does not exist; check the path or "
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise UserError(f"{missing}name a hub id (owner/name)")
    if path.parent.is_dir():  # most likely a typo in the name of a local folder
        with suppress(HFValidationError):
            if isinstance(try_to_load_from_cache(name, "config.json"), str):
                return
        raise UserError(f"{missing}fetch the hub's model of that name with `hf download {name}`")


def require_no_difference(
    missing: Set[str], unexpected: Set[str], reshaped: Set[str], problem: str, model: str
) -> None:
    """Raise a `UserError` with ``problem``, and the number and first name of each kind of wrong tensors."""
    found = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    if parts := "; ".join(f"{len(keys)} {kind}, first '{min(keys)}'" for kind, keys in found.items() if keys):
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
