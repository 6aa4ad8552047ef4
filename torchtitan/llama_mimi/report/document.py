"""Documents with text, audio, pictures and tables, written as Markdown or as one HTML file.

Text between backticks is code. All other text is shown literally, so a document can show any error message.
"""

import base64
import importlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from llama_mimi.common.errors import UserError
from llama_mimi.common.files import write_atomically


@dataclass(frozen=True)
class Picture:
    name: str  # file name, in the folder of the Markdown file
    png: bytes
    alt: str  # description for screen readers


@dataclass(frozen=True)
class Table:
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Clip:
    """Audio with its spectrogram, for HTML only. Without audio, `mp3` and `webp` are empty."""

    title: str
    seconds: float = 0.0  # length; the clips of a section have the same time axis
    mp3: bytes = b""
    webp: bytes = b""
    lines: Sequence[str] = ()  # text below the audio, such as a transcript


@dataclass(frozen=True)
class Section:
    """A section of a document, with fields in the order of display. The first section has the document's title."""

    title: str
    texts: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    items: Sequence[str] = ()  # list items
    clips: Sequence[Clip] = ()  # shown side by side


def to_markdown(sections: Sequence[Section]) -> str:
    """Return a document as Markdown with links to its pictures."""
    blocks = []
    for number, section in enumerate(sections):
        blocks += [f"{'##' if number else '#'} {_inert(section.title)}", *map(_inert, section.texts)]
        blocks += [f"![{_inert(picture.alt)}]({picture.name})" for picture in section.pictures]
        for table in section.tables:
            rows = [list(map(_inert, row)) for row in (table.header, *table.rows)]
            rows.insert(1, ["---"] * len(table.header))
            blocks.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
        blocks += ["\n".join(f"- {_inert(item)}" for item in section.items)] if section.items else []
    return "\n\n".join(blocks) + "\n"


def write_markdown(sections: Sequence[Section], path: Path) -> None:
    """Write a document as Markdown, and its pictures into the same folder."""
    for picture in (picture for section in sections for picture in section.pictures):
        write_atomically(str(path.parent), picture.name, picture.png)
    write_atomically(str(path.parent), path.name, to_markdown(sections).encode())


def _inert(text: str) -> str:
    """Return a text as one line. All markup is escaped, except code between backticks."""
    parts = re.split(r"(`[^`]+`)", " ".join(text.split()))  # odd parts are code
    parts[::2] = [re.sub(r"[\\`*_|<>\[\]~&#]", r"\\\g<0>", part) for part in parts[::2]]
    parts[1::2] = [part.replace("|", r"\|") for part in parts[1::2]]
    return "".join(parts)


def write_html(title: str, sections: Sequence[Section], path: Path) -> None:
    """Write a document as a self-contained HTML file without scripts; print the size of the file."""
    folder = Path(__file__).parent / "templates"
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(folder), autoescape=True, trim_blocks=True)
    environment.filters["data"] = lambda content, kind: f"data:{kind};base64,{base64.b64encode(content).decode()}"
    environment.filters["parts"] = re.compile("(`[^`]+`)").split  # odd parts are code
    environment.tests["number"] = re.compile(r"[-+]?[\d.,]+ ?%?").fullmatch
    template = environment.get_template("page.html.jinja")
    content = template.render(title=title, sections=sections, ticks=_ticks).encode()
    write_atomically(str(path.parent), path.name, content)
    print(f"written to {path} ({len(content) / 1e6:.1f} MB)")


def _ticks(seconds: float) -> list[float]:
    """Return the positions of up to six labels, in seconds, on a time axis from 0 to ``seconds``."""
    step = next(step for step in (0.2, 0.5, 1, 2, 5, 10, 30, 60, 300, 3600, seconds) if seconds / step < 6)
    return [step * number for number in range(int(seconds / step) + 1)]


def import_extra(module: str, user: str = "a picture", remedy: str = "run `uv sync --inexact --extra plots`") -> Any:
    """Import an optional module; raise a `UserError` if the module is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{user} needs the package {error.name or module}; {remedy}") from error


def pyplot() -> Any:
    """Return `matplotlib.pyplot` with a backend that works without a display."""
    import_extra("matplotlib").use("Agg")
    return import_extra("matplotlib.pyplot")


def save_picture(figure: Any) -> bytes:
    """Return a figure as the bytes of a PNG file, and close the figure."""
    content = io.BytesIO()
    figure.savefig(content, dpi=120, format="png", bbox_inches="tight")
    pyplot().close(figure)
    return content.getvalue()
