"""Command lines with ``--snake_case`` flags. After a user error, they print one sentence and exit with code 1."""

import contextlib
import errno
import io
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import tyro

from llama_mimi.common.errors import UserError, first_line, report

TYRO: dict[str, Any] = {"use_underscores": True, "config": (tyro.conf.OmitArgPrefixes,)}
DISK_ERRORS = "ENOSPC EDQUOT EFBIG EROFS EACCES ENOTDIR EEXIST".split()


def run_command(command: Callable[..., None], doc: str | None) -> None:
    """Run a function as a command. Its parameters, and the fields of its dataclass parameters, are the flags."""
    run_cli(lambda: tyro.cli(command, description=doc, **TYRO))


def parse_options(kind: type, words: Sequence[str]) -> Any:
    """Parse command-line arguments into an options object; raise tyro's errors as `UserError`."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            return tyro.cli(kind, args=words, **TYRO)
    except SystemExit as error:
        # tyro prints a title, the reason and the help text, separated by lines of dashes.
        reason = re.split(r"^\s*-{20,}\s*$", output.getvalue(), flags=re.MULTILINE)[1:2] or [output.getvalue()]
        raise UserError(" ".join(reason[0].split())) from error


def run_cli(main: Callable[[], None]) -> None:
    """Run ``main``. For a `UserError`, full memory or an unusable disk, print one sentence and exit with code 1."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may not be UTF-8
    try:
        return main()
    except UserError as error:
        report(error)
    except torch.OutOfMemoryError as error:
        report(UserError(f"the memory of the device is full ({first_line(error)}); lower the batch size"))
    except Exception as error:
        in_text = re.search(r"\(os error (\d+)\)", str(error))  # as in errors of tokenizers and safetensors
        number = int(in_text[1]) if in_text else getattr(error, "errno", None) or 0
        if errno.errorcode.get(number) not in DISK_ERRORS:
            raise
        name = getattr(error, "filename2", None) or getattr(error, "filename", None)  # filename2: target of a copy
        file = f"'{name}'" if name else "a file"
        problem = f"{file} cannot be used ({os.strerror(number)})"
        report(UserError(f"{problem}; free disk space, change the file's permissions, or choose another folder"))
    sys.exit(1)


def to_cli_args(settings: Mapping[str, Any]) -> list[str]:
    """Return settings as command-line arguments for tyro."""
    words: list[str] = []
    for name, value in settings.items():
        if isinstance(value, bool):
            section, dot, key = name.rpartition(".")
            words.append(f"--{name}" if value else f"--{section}{dot}no-{key}")
        else:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words
