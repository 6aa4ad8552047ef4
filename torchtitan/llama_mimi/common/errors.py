"""How a user's mistake is reported: one sentence, never a traceback."""


class UserError(Exception):
    """Something the user can put right. The message says what was wrong, with which value, and what to do."""


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error for a sentence of ours, or its type if it has no message.

    A line that ends with a colon is followed by the next one, which names the cause.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[: 1 + lines[0].endswith(":")]).rstrip(".")
