"""Command lines with ``--snake_case`` flags. After a user error, a command prints a sentence and exits with code 1."""

import contextlib
import dataclasses
import errno
import functools
import inspect
import io
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, get_type_hints

import tyro

from llama_mimi.common.errors import UserError, first_line, report

TYRO: dict[str, Any] = {"use_underscores": True, "config": (tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone)}
REPORT = "--extra plots python scripts/report.py"
DISK_ERRORS = "ENOSPC EDQUOT EFBIG EROFS EACCES ENOTDIR EEXIST".split()


def run_command(function: Callable[..., None], doc: str | None) -> None:
    """Run a function as a command. The function's parameters, and the fields of dataclass parameters, become flags."""
    bind = functools.wraps(function)(lambda *args, **kwargs: functools.partial(function, *args, **kwargs))
    with command(bind, doc) as call:
        call()


@contextlib.contextmanager
def command(kind: Callable[..., Any], doc: str | None, **settings: Any) -> Iterator[Any]:
    """Parse flags, and yield an options object. Import PyTorch in the ``with`` block: this import takes seconds."""
    hide_none(kind)
    with report_errors():
        options = tyro.cli(kind, description=doc, **TYRO, **settings)
        print_loading("libraries")
        yield options


def hide_none(kind: Any) -> None:
    """In help texts, hide the default None, because each text names its default itself. tyro reads annotations."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(kind).parameters.items()}
    for name, annotation in get_type_hints(kind, include_extras=True).items():
        if defaults.get(name, inspect.Parameter.empty) is None:
            kind.__annotations__[name] = Annotated[annotation, tyro.conf.arg(help_behavior_hint="")]
        elif dataclasses.is_dataclass(annotation):
            hide_none(annotation)


def is_first_rank() -> bool:
    """Return True on rank 0 of torchrun and in a single process."""
    return int(os.environ.get("RANK", 0)) == 0


def print_loading(what: str) -> None:
    """If PyTorch is not imported yet, print on rank 0 that ``what`` will be loaded."""
    if "torch" not in sys.modules and is_first_rank():
        print(f"loading {what} ...", file=sys.stderr, flush=True)


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


@contextlib.contextmanager
def report_errors() -> Iterator[None]:
    """After a `UserError`, an out-of-memory error or a disk error, print one sentence and exit with code 1."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may not be UTF-8
    try:
        yield
        return
    except UserError as error:
        report(error)
    except Exception as error:
        in_text = re.search(r"\(os error (\d+)\)", str(error))  # as in errors of tokenizers and safetensors
        number = int(in_text[1]) if in_text else getattr(error, "errno", None) or 0
        if type(error).__name__ == "OutOfMemoryError":  # PyTorch's class; this module does not import PyTorch
            report(UserError(f"the memory of the device is full ({first_line(error)}); lower the batch size"))
        elif errno.errorcode.get(number) in DISK_ERRORS:
            name = getattr(error, "filename2", None) or getattr(error, "filename", None)  # target of a copy
            file = f"'{name}'" if name else "a file"
            problem = f"{file} cannot be used ({os.strerror(number)})"
            report(UserError(f"{problem}; free disk space, change the file's permissions, or choose another folder"))
        else:
            raise
    sys.exit(1)


def print_next(program: str, **settings: Any) -> None:
    """Print the command that a user usually runs next. A setting with the value None is skipped."""
    flags = to_cli_args({name: value for name, value in settings.items() if value is not None})
    print(f"next: uv run {program} {shlex.join(flags)}", flush=True)


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
