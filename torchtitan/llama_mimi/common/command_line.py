"""Commands and their flags: --snake_case, a mistake as one sentence on stderr and exit code 1."""

import contextlib
import errno
import io
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import tyro

from llama_mimi.common.errors import UserError, report

Options = TypeVar("Options")
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


def run_command(command: Callable[..., None], doc: str | None) -> None:
    """Call a function with what the command line gives, as ``--snake_case`` flags.

    Args:
        command: its annotated parameters are the flags, or the fields of a dataclass that it takes.
        doc: of the script.
    """
    run_cli(lambda: _parsed(command, doc, None))


def _parsed(target: Callable[..., Any], doc: str | None, words: Sequence[str] | None) -> Any:
    return tyro.cli(target, args=words, description=doc, use_underscores=True, config=(tyro.conf.OmitArgPrefixes,))


def read_flags(kind: type[Options], words: Sequence[str]) -> Options:
    """What a command that takes such options would be given by these words, without starting it.

    Raises:
        UserError: what it would say of them.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return _parsed(kind, None, words)
    except SystemExit as error:
        # A title, then the reason, then help, with lines of dashes between them.
        reason = re.split(r"^\s*-{20,}\s*$", said.getvalue(), flags=re.MULTILINE)[1:2] or [said.getvalue()]
        raise UserError(" ".join(reason[0].split())) from error


def run_cli(main: Callable[[], None]) -> None:
    """Run a script's ``main`` and turn a `UserError` or a full or read-only disk into one sentence and exit code 1."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be UTF-8; stderr is set so by default
    try:
        main()
    except UserError as error:
        report(error)
        sys.exit(1)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        file = error.filename2 or error.filename  # of a copy, where it was to go
        problem = f"'{file or 'a file'}' cannot be used ({error.strerror})"
        report(UserError(f"{problem}; free disk space, set its permissions, or choose another folder"))
        sys.exit(1)


def as_words(settings: Mapping[str, Any]) -> list[str]:
    """Settings as a command line has them; a switch that is off is written as tyro wants it."""
    found: list[str] = []
    for name, value in settings.items():
        if isinstance(value, bool):
            section, dot, key = name.rpartition(".")
            found.append(f"--{name}" if value else f"--{section}{dot}no-{key}")
        else:
            found += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return found
