"""How a user's mistake is reported: one sentence on stderr and exit code 1, never a traceback."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can put right. The message says what was wrong, with which value, and what to do."""


def first_line(error: BaseException) -> str:
    """What an error of another library says, for a sentence of ours; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def run_command(command: Callable[..., None], doc: str | None) -> None:
    """Call a function with what the command line gives, as ``--snake_case`` flags.

    Args:
        command: its annotated parameters are the flags, or the fields of a dataclass that it takes.
        doc: of the script.
    """
    import tyro  # needed by commands alone, and UserError by every loader worker

    run_cli(lambda: tyro.cli(command, description=doc, use_underscores=True, config=(tyro.conf.OmitArgPrefixes,)))


def run_cli(main: Callable[[], None]) -> None:
    """Run a script's ``main`` and turn a `UserError` into one sentence and exit code 1."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
