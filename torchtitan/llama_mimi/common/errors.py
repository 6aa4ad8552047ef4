"""How a user's mistake is reported: one sentence, never a traceback."""

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

RANK_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # torchrun names a file for each rank and prints its content at the end


class UserError(Exception):
    """Something the user can put right. The message says what was wrong, with which value, and what to do."""


def report(error: UserError) -> None:
    """Print an error's sentence; under torchrun leave that to torchrun, whose own lines would follow it."""
    sentence = f"error: {error}"
    if path := os.environ.get(RANK_ERROR_FILE):
        # Torchrun prints the earliest failure last. The ranks that it ends fail within the same second.
        extra = {"py_callstack": f"\n{sentence}", "timestamp": str(int(time.time()) - 1)}
        try:
            Path(path).write_text(json.dumps({"message": {"message": sentence, "extraInfo": extra}}))
            return
        except OSError:  # such as a full disk, where torchrun cannot read what was begun
            with suppress(OSError):
                Path(path).unlink(missing_ok=True)
    print(sentence, file=sys.stderr)


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error for a sentence of ours, or its type if it has no message.

    A line that ends with a colon is followed by the next one, which names the cause.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[: 1 + lines[0].endswith(":")]).rstrip(".")
