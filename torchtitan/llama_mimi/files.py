"""Files on any fsspec path: found, read as JSON, and written so that they are whole or not there."""

import json
from typing import Any
from uuid import uuid4

import fsspec

from llama_mimi.errors import UserError

# What is written under another name first, before it is moved into place.
PARTIAL = ".partial"


def file_system(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a path, and the path on it.

    Raises:
        UserError: a protocol that is unknown or needs another package.
    """
    try:
        return fsspec.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"'{path}' cannot be opened ({error}); install what that protocol needs, or use another"
        ) from error


def is_local(fs: fsspec.AbstractFileSystem) -> bool:
    return "file" in fs.protocol


def find_files(path: str, in_folder: str) -> list[str]:
    """Sorted fsspec paths that match ``path``, or ``in_folder`` inside of it where it is a folder.

    Raises:
        UserError: the file system cannot be reached.
    """
    fs, bare = file_system(path)
    try:
        pattern = f"{bare.rstrip('/')}/{in_folder}" if fs.isdir(bare) else bare
        found = sorted(fs.glob(pattern))
    except Exception as error:  # remote file systems raise what their transports raise
        detail = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"'{path}' cannot be listed ({detail}); check the path and the network") from error
    return found if is_local(fs) else [fs.unstrip_protocol(file) for file in found]


def sizes_in(folder: str) -> dict[str, int]:
    """Name -> bytes of the files in a folder; none where there is no folder."""
    fs, bare = file_system(folder)
    found = fs.find(bare, maxdepth=1, detail=True)
    return {path.rsplit("/", 1)[-1]: info["size"] for path, info in found.items()}


def read_json(folder: str, name: str) -> dict[str, Any] | None:
    """A JSON object in a folder, or None where there is no such file.

    Raises:
        UserError: it cannot be read, or is no JSON object.
    """
    fs, bare = file_system(folder)
    path = f"{bare.rstrip('/')}/{name}"
    try:
        values = json.loads(fs.cat_file(path))
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        raise UserError(f"'{folder}/{name}' is no readable JSON ({error}); mend it or make the folder anew") from error
    if not isinstance(values, dict):
        raise UserError(f"'{folder}/{name}' is no JSON object; mend it or make the folder anew")
    return values


def write_whole(folder: str, name: str, content: bytes) -> None:
    """Write a file that nobody sees half: aside and then moved on a local file system, in one upload elsewhere.

    Raises:
        UserError: the file system is full or refuses.
    """
    fs, bare = file_system(folder)
    path = f"{bare.rstrip('/')}/{name}"
    try:
        fs.makedirs(bare, exist_ok=True)
        if is_local(fs):
            aside = f"{path}.{uuid4().hex}{PARTIAL}"
            fs.pipe_file(aside, content)
            fs.mv(aside, path)
        else:
            fs.pipe_file(path, content)
    except OSError as error:
        raise UserError(
            f"'{folder}/{name}' could not be written ({error.strerror or error}); make room or mend the folder and "
            "start again: what is finished is kept"
        ) from error
