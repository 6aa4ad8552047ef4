"""Files on any fsspec path: found, read as JSON, and written so that they are whole or not there."""

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

# Ending of the hidden files that are still being written.
PARTIAL = ".partial"
LOCK = ".lock"  # of a folder that one process may write to
SYNTHETIC = "SYNTHETIC"  # file that marks a folder of synthesised speech


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


def find_files(path: str, endings: tuple[str, ...]) -> list[str]:
    """Sorted fsspec paths of the files that ``path`` means: a folder, a file, or a glob.

    Args:
        path: a folder stands for its files at any depth that end so, but hidden ones (`is_hidden`), as macOS's ``._``
            sidecars and the ``.cache`` of a download.
        endings: such as ".parquet"; capitals do not matter.

    Raises:
        UserError: the file system cannot be reached.
    """
    fs, bare = file_system(path)
    try:
        if fs.isdir(bare):
            inside = _below_local(bare) if is_local(fs) else fs.find(bare)
            found = [file for file in inside if file.lower().endswith(endings) and not is_hidden(_below(file, bare))]
        else:
            found = _matches(fs, bare)
    except Exception as error:  # remote file systems raise what their transports raise
        raise UserError(f"'{path}' cannot be listed ({first_line(error)}); check the path and the network") from error
    return sorted(found if is_local(fs) else map(fs.unstrip_protocol, found))


def is_hidden(relative: str) -> bool:
    """Whether a path is, or lies in, what nobody put there on purpose: ``.cache/x``, ``a/._b``, ``__MACOSX/c``.

    It is the rule by which `datasets` leaves them out of a folder.
    """
    *folders, name = relative.split("/")
    return name.startswith(".") or any(folder.startswith((".", "__")) for folder in folders)


def is_synthetic(path: str) -> bool:
    """Return True for a local path, or a glob, below a folder of synthesised speech."""
    absolute = Path(path).absolute()
    return any((folder / SYNTHETIC).is_file() for folder in (absolute, *absolute.parents))


def as_utf8(name: str) -> str:
    r"""Return a file name, or a message about one, with bytes that are not UTF-8 written as ``\xe9``."""
    return os.fsencode(name).decode(errors="backslashreplace")


def visible_files(folder: Path, pattern: str) -> list[Path]:
    """Return the files below a folder that match a glob and are not hidden, sorted."""
    return sorted(path for path in folder.glob(pattern) if not is_hidden(path.relative_to(folder).as_posix()))


def _below_local(folder: str) -> list[str]:
    """Files below a folder, also through links to folders, each folder once; fsspec does not follow them."""
    found: list[str] = []
    seen: set[str] = set()
    for path, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(path)) in seen:
            folders.clear()
            continue
        seen.add(real)
        found += [f"{path}/{name}" for name in names]
    return found


def _matches(fs: fsspec.AbstractFileSystem, pattern: str) -> list[str]:
    """The file of that name, or what the glob matches. Brackets in the name of a folder that exists are no pattern."""
    if fs.isfile(pattern):
        return [pattern]
    parts = pattern.split("/")
    literal = 0  # parts that exist as they are spelt
    for index, part in enumerate(parts):
        if set(part) & set("*?[") and not ("[" in part and fs.exists("/".join(parts[: index + 1]))):
            break
        literal = index + 1
    escaped = "/".join([*map(escape, parts[:literal]), *parts[literal:]])
    # fsspec does not look through links to folders
    found = glob(escaped, recursive=True, include_hidden=True) if is_local(fs) else fs.glob(escaped)
    if any(is_hidden(part) for part in parts[literal:]):  # asked for
        return found
    return [file for file in found if not is_hidden(_below(file, "/".join(parts[:literal])))]


def _below(file: str, folder: str) -> str:
    return file[len(folder) :].lstrip("/")


def digest(content: Any) -> str:
    """SHA-256 of what JSON can hold."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def sizes_in(folder: str) -> dict[str, int]:
    """Name -> bytes of the files in a folder; none where there is no folder."""
    fs, bare = file_system(folder)
    found = fs.find(bare, maxdepth=1, detail=True)
    return {path.rsplit("/", 1)[-1]: info["size"] for path, info in found.items()}


def parse_json(text: str | bytes) -> Any:
    """Return what JSON contains.

    Raises:
        ValueError: it is damaged, or nested too deeply for Python.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_json(folder: str, name: str) -> dict[str, Any] | None:
    """A JSON object in a folder, or None where there is no such file.

    Raises:
        UserError: it cannot be read, or is not a JSON object.
    """
    fs, bare = file_system(folder)
    path = f"{bare.rstrip('/')}/{name}"
    try:
        values = parse_json(fs.cat_file(path))
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        raise UserError(f"'{folder}/{name}' is not readable as JSON ({error}); fix or remove the file") from error
    if not isinstance(values, dict):
        raise UserError(f"'{folder}/{name}' is not a JSON object; fix or remove the file")
    return values


def write_atomically(folder: str, name: str, content: bytes) -> None:
    """Write a file so that nobody sees half of it: aside and then moved, or on other file systems in one upload.

    A symbolic link stays, and its target is written.

    Raises:
        UserError: the file system is full or refuses.
    """
    fs, bare = file_system(folder)
    path = f"{bare.rstrip('/')}/{name}"
    path = os.path.realpath(path) if is_local(fs) else path
    aside = f"{os.path.dirname(path)}/.{uuid4().hex}{PARTIAL}"  # a name as long as the target's may have no room
    try:
        fs.makedirs(bare, exist_ok=True)
        if is_local(fs):
            fs.pipe_file(aside, content)
            fs.mv(aside, path)
        else:
            fs.pipe_file(path, content)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        raise UserError(
            f"'{folder}/{name}' could not be written ({error.strerror or error}); free disk space, or choose "
            "another folder"
        ) from error


def share_weights(folder: Path) -> None:
    """Give the weights in a folder the mode of its ``config.json``; safetensors writes them for their owner alone."""
    for path in folder.glob("*.safetensors"):
        path.chmod((folder / "config.json").stat().st_mode)


@contextlib.contextmanager
def locked(path: Path, setting: str, wait: bool = False) -> Iterator[None]:
    """Hold the lock of a file until the block or the process ends.

    A file system without locks (some mounts of NFS and Lustre) gets a warning, and the work goes on.

    Args:
        path: lock file. Its folder is created.
        setting: flag or key that names the folder, for errors.
        wait: wait for another process that holds the lock.

    Raises:
        UserError: the file cannot be written, or another process holds the lock and ``wait`` is not set.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        raise UserError(f"'{path.parent}' cannot be written ({error.strerror}); choose another {setting}") from error
    with file:
        try:  # unlike flock, lockf is not inherited by loader workers
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                print(f"'{path.parent}' cannot be locked ({error.strerror}): start one process only on it", flush=True)
            elif error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            elif not wait:
                raise UserError(
                    f"another process writes to '{path.parent}'; wait for it, stop it, or choose another {setting}"
                ) from error
            else:
                print(f"waiting for another process, which holds '{path}'", flush=True)
                fcntl.lockf(file, fcntl.LOCK_EX)
        yield
