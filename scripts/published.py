"""Numbers that others have published, for tables: eval/published.toml."""

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_mimi.common.errors import UserError

AXES_OF_OTHERS = ("architecture", "num_quantizers", "level_weights")  # which are known of some


@dataclass(frozen=True)
class Published:
    """A row of others.

    Args:
        label: the model, and where the numbers stand.
        scores: by column, as they are shown.
        arm: axes of a study of ours that would train such a model, of any size, as far as they are known.
    """

    label: str
    scores: dict[str, float]
    arm: dict[str, Any]


def read_published(path: Path, kind: str, columns: Iterable[str]) -> list[Published]:
    """Rows of one kind.

    Args:
        kind: "rows", accuracies in percent, or "generations", what judged continuations have.
        columns: that there are; "judge/" stands for all that begin so.

    Raises:
        UserError: the file is missing or is not as it should be.
    """
    try:
        found = [
            Published(
                f"{row['model']} [{row['source']}]",
                {column: float(score) for column, score in row["scores"].items()},
                {**row.get("arm", {})},
            )
            for row in tomllib.loads(path.read_text())[kind]
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"'{path}' is no list of published rows ({error}); see eval/published.toml") from error
    known = [*columns]
    for row in found:
        if unknown := row.arm.keys() - {*AXES_OF_OTHERS}:
            raise UserError(f"'{path}' says '{min(unknown)}' of an arm; it takes {', '.join(AXES_OF_OTHERS)}")
        if odd := [c for c in row.scores if c not in known and not (c.startswith("judge/") and "judge/" in known)]:
            raise UserError(f"'{path}' has the column '{odd[0]}' of {row.label}, which is none of {', '.join(known)}")
    return found
