"""Documents: sections of text, pictures and tables, written as Markdown or as one HTML file."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Picture:
    """A picture of a section.

    Args:
        name: file name beside the Markdown file.
        png: content of the file.
        alt: description for readers who do not see it.
    """

    name: str
    png: bytes
    alt: str


@dataclass(frozen=True)
class Table:
    """Rows of text, at most six columns so that a page of 1,280 pixels shows all of them."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """A part of a document.

    Args:
        title: heading. The first section's title is that of the document.
        texts: paragraphs. Text between backticks is code; nothing else is markup.
        pictures: pictures, above the tables.
        tables: tables.
        items: list below the tables.
    """

    title: str
    texts: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    items: Sequence[str] = ()
