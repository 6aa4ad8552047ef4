"""Functions that find, read, write and lock files. Most functions accept any fsspec path."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from glob import escape, glob
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec

from llama_mimi.common.errors import UserError, first_line

PARTIAL = ".partial"  # ending of a hidden file that is being written
LOCK = ".lock"  # lock file of a folder that only one process may write to
SYNTHETIC = "SYNTHETIC"  # a file of this name marks a folder of synthesised speech


def file_system(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Split a path into its file system and a bare path; raise a `UserError` if the protocol is not available."""
    try:
        return fsspec.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise UserError(f"'{path}' cannot be opened ({error}); install the Python package for its protocol") from error


def is_local(fs: fsspec.AbstractFileSystem) -> bool:
    return "file" in fs.protocol


def find_files(path: str, endings: tuple[str, ...]) -> list[str]:
    """Return the sorted visible files of a path, glob or folder. ``endings``: file endings to find in a folder."""
    fs, bare = file_system(path)
    try:
        start = bare  # an existing folder is not a pattern, even with brackets in its name
        while start.strip("/") and not fs.exists(start):
            start = os.path.dirname(start)
        if fs.isdir(bare):
            below = _walk(bare) if is_local(fs) else fs.find(bare)
            found = [file for file in below if file.lower().endswith(endings)]
        elif start == bare:
            found = [bare]
        else:  # fsspec's own glob does not follow links
            pattern = escape(start) + bare[len(start) :]
            found = glob(pattern, recursive=True) if is_local(fs) else fs.glob(pattern)
        found = sorted(file for file in found if not is_hidden(file[len(start) :].lstrip("/")))
    except Exception as error:  # the type of the error depends on the file system
        raise UserError(f"'{path}' cannot be listed ({first_line(error)}); check the path and the network") from error
    return found if is_local(fs) else [fs.unstrip_protocol(file) for file in found]


def _walk(folder: str) -> Iterator[str]:
    """Yield all files below a local folder. Unlike fsspec, follow links to folders, but visit each folder once."""
    seen: set[str] = set()
    for path, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(path)) in seen:
            folders.clear()
        else:
            seen.add(real)
            yield from (f"{path}/{name}" for name in names)


def visible_files(folder: Path, pattern: str) -> list[Path]:
    """Return the visible paths below ``folder`` that match the glob ``pattern``, in sorted order."""
    return sorted(path for path in folder.glob(pattern) if not is_hidden(path.relative_to(folder).as_posix()))


def is_hidden(relative: str) -> bool:
    """Return True for hidden and system files (``.cache/x``, ``a/._b``, ``__MACOSX/c``), as `datasets` does."""
    *folders, name = relative.split("/")
    return name.startswith(".") or any(folder.startswith((".", "__")) for folder in folders)


def is_synthetic(path: str) -> bool:
    """Return True if a local path or glob is below a folder of synthesised speech."""
    return any((folder / SYNTHETIC).is_file() for folder in (Path(path).absolute() / "_").parents)


def as_utf8(name: str) -> str:
    r"""Return a file name or a message as valid UTF-8. Invalid bytes are replaced by escapes such as ``\xe9``."""
    return os.fsencode(name).decode(errors="backslashreplace")


def digest(content: Any) -> str:
    """Return the SHA-256 of a JSON-serialisable value."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def sizes_in(folder: str) -> dict[str, int]:
    """Return the size in bytes of each file in a folder, by name; the dict is empty if the folder does not exist."""
    fs, bare = file_system(folder)
    found = fs.find(bare, maxdepth=1, detail=True)
    return {path.rsplit("/", 1)[-1]: info["size"] for path, info in found.items()}


def parse_json(text: str | bytes) -> Any:
    """Parse JSON; raise a ValueError if the text is damaged or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_json(folder: str, name: str) -> dict[str, Any] | None:
    """Return the JSON object in a file, or None if the file does not exist; raise a `UserError` for other content."""
    fs, bare = file_system(folder)
    try:
        values = parse_json(fs.cat_file(f"{bare.rstrip('/')}/{name}"))
        if isinstance(values, dict):
            return values
        reason = "not a JSON object"
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        reason = str(error)
    raise UserError(f"'{folder}/{name}' is not readable as JSON ({reason}); correct the JSON, or remove the file")


def write_atomically(folder: str, name: str, content: bytes) -> None:
    """Write a local file under a temporary name and rename it, or upload a remote file in one call."""
    fs, bare = file_system(folder)
    path = f"{bare.rstrip('/')}/{name}"
    path = os.path.realpath(path) if is_local(fs) else path
    aside = f"{os.path.dirname(path)}/.{uuid4().hex}{PARTIAL}"  # short: a name may be 255 bytes
    try:
        fs.makedirs(bare, exist_ok=True)
        fs.pipe_file(aside if is_local(fs) else path, content)
        if is_local(fs):
            os.replace(aside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        problem = f"'{folder}/{name}' could not be written ({error.strerror or error})"
        raise UserError(f"{problem}; free disk space, or choose another folder") from error


def share_weights(folder: Path) -> None:
    """Give weight files the permissions of ``config.json``; by default, only their owner can read them."""
    for path in folder.rglob("*.safetensors"):
        path.chmod((folder / "config.json").stat().st_mode)


@contextlib.contextmanager
def locked(path: Path, setting: str, wait: bool = False) -> Iterator[None]:
    """Lock a file until the ``with`` block or the process ends. Warn if the file system lacks locks (NFS, Lustre).

    If another process has locked the file, wait (``wait``), or raise a `UserError` that names ``setting``, the flag or
    key of the folder. A missing folder is created.
    """
    folder = path.parent
    folder.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:  # loader workers inherit a flock, but not a lockf
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                print(f"'{folder}' cannot be locked ({error.strerror}); use the folder in one process only", flush=True)
            elif wait:
                print(f"waiting for another process, which has locked '{path}'", flush=True)
                fcntl.lockf(file, fcntl.LOCK_EX)
            else:
                remedy = f"wait until that process ends, stop it, or choose another {setting}"
                raise UserError(f"another process writes to '{folder}'; {remedy}") from error
        yield
