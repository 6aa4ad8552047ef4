"""How a user's mistake is reported: one sentence, never a traceback."""


class UserError(Exception):
    """Something the user can put right. The message says what was wrong, with which value, and what to do."""


def first_line(error: BaseException) -> str:
    """What an error of another library says, for a sentence of ours; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
