"""Loading configurations, tokenizers and weights from a folder or the hub, with errors users can act on."""

import hashlib
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from llama_mimi.common.errors import UserError, first_line
from llama_mimi.common.files import visible_files


def load_pretrained(cls: Any, name: str, *, what: str, allow_torch_weights: bool = False, **kwargs: Any) -> Any:
    """``cls.from_pretrained(name)``, refusing pickled weights and remote code.

    Args:
        cls: a `transformers` class.
        name: hub id or folder.
        what: what is being loaded ("codec", "model", "tokenizer"), for the message.
        allow_torch_weights: take ``.bin`` files where there are no safetensors; PyTorch reads weights alone from them.

    Raises:
        UserError: the folder or hub model is missing, gated, unreachable, or not of this kind.
    """
    if Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        if not Path(name).expanduser().is_dir():
            raise UserError(f"the {what} folder '{name}' does not exist; check the path or name a hub id (owner/name)")
    if Path(name).is_dir() and not any((Path(name) / f).is_file() for f in ("config.json", "tokenizer_config.json")):
        raise UserError(f"'{name}' holds no {what} (no config.json in it); name a Hugging Face model folder")
    if "dtype" in kwargs:  # a model, not a configuration or tokenizer
        kwargs["use_safetensors"] = None if allow_torch_weights else True
    try:
        return cls.from_pretrained(name, **kwargs)
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        if Path(name).is_dir():
            raise UserError(f"the {what} in '{name}' could not be loaded: {first_line(error)}") from error
        raise UserError(
            f"the {what} '{name}' could not be loaded from the Hugging Face Hub ({first_line(error)}); if it is gated, "
            f"accept its licence on its page and run `hf auth login`; without a network, download it elsewhere with "
            f"`hf download {name} --local-dir FOLDER` and name that folder"
        ) from error


def weights_sha256(name: str) -> str:
    """SHA-256 of the safetensors files of a model that was loaded before, in the order of their names.

    Where there are none, of its ``.bin`` files.

    Args:
        name: hub id or folder.
    """
    folder = Path(name)
    if not folder.is_dir():
        folder = Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.bin"], local_files_only=True))
    digest = hashlib.sha256()
    for path in visible_files(folder, "*.safetensors") or visible_files(folder, "*.bin"):
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
