"""Writing pictures."""

import io
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from llama_mimi.common.errors import UserError
from llama_mimi.common.files import write_atomically


def save(figure: Figure, path: Path, *, dpi: int) -> None:
    """Write a picture, and close it.

    Raises:
        UserError: it cannot be written.
    """
    content = io.BytesIO()
    try:
        figure.savefig(content, dpi=dpi, format=path.suffix[1:] or None)
    except ValueError as error:
        raise UserError(f"the picture '{path}' could not be written ({error}); choose another --picture") from error
    finally:
        plt.close(figure)
    write_atomically(str(path.parent), path.name, content.getvalue())
