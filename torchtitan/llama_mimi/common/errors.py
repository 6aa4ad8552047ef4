"""User errors, which are printed as one sentence without a traceback."""

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

RANK_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # each rank has such a file, and torchrun prints it


class UserError(Exception):
    """An error that the user can fix. The message gives the value, the cause and the remedy."""


def report(error: UserError) -> None:
    """Print an error as one sentence. Under torchrun, the sentence is printed after torchrun's own lines."""
    sentence = f"error: {error}"
    if path := os.environ.get(RANK_ERROR_FILE):
        # Torchrun prints the earliest failure last. Ranks that torchrun stops fail within the same second.
        extra = {"py_callstack": f"\n{sentence}", "timestamp": str(int(time.time()) - 1)}
        with suppress(OSError):  # the disk may be full
            Path(path).write_text(json.dumps({"message": {"message": sentence, "extraInfo": extra}}))
            return
        Path(path).unlink(missing_ok=True)  # torchrun cannot read a truncated file
    print(sentence, file=sys.stderr)


def first_line(error: BaseException) -> str:
    """Return an error's first line (two lines if the first ends with a colon), or its type if the message is empty."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[: 1 + lines[0].endswith(":")]).rstrip(".")
