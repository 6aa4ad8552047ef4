"""Writing pictures."""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from llama_mimi.common.errors import UserError


def save(figure: Figure, path: Path, *, dpi: int) -> None:
    """Write a picture, and close it.

    Raises:
        UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=dpi)
    except (OSError, ValueError) as error:
        raise UserError(f"the picture '{path}' could not be written ({error}); choose another --picture") from error
    finally:
        plt.close(figure)
