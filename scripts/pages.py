"""Pages that hold everything in one file, which opens from a disk, without a server or anything from elsewhere."""

import base64
import io
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import soundfile
import torch
import torchaudio
from matplotlib.figure import Figure
from PIL import Image

from llama_mimi.common.files import write_atomically

WINDOW, HOP = 1024, 240  # 43 ms every 10 ms at 24 kHz
TOP_DB, RANGE_DB = 40.0, 80.0  # full scale is about 48 dB; what is softer than -40 dB is black
SPECTROGRAM_ROWS, MAX_COLUMNS = 96, 480
MARK_COLUMNS, MARK_COLOR = 2, (90, 220, 255)
MP3_QUALITY = 0.6  # of soundfile: 0 is the best; 5 kB a second at 24 kHz

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 72rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .2rem; } .card h4 { margin: .2rem 0; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .6rem; text-align: left; vertical-align: top; }
thead th { white-space: nowrap; } tbody th { font-weight: normal; }
td:has(a) { min-width: 10rem; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(17rem, 100%), 1fr)); gap: .8rem; }
.card { border: 1px solid var(--line); border-radius: .4rem; padding: .6rem; background: var(--soft); min-width: 0; }
p, li { overflow-wrap: anywhere; }
.card p { margin: .3rem 0; font-size: .85rem; }
audio { width: 100%; height: 2.4rem; } img { max-width: 100%; height: auto; } img.chart { background: white; }
img.sound { width: 100%; height: 5rem; display: block; image-rendering: auto; }
a:focus-visible, audio:focus-visible, .wide:focus-visible { outline: 3px solid #48f; }
"""


def page(title: str, parts: Iterable[str]) -> str:
    """A whole page.

    Args:
        title: as text.
        parts: of its body, as HTML.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{escape(title)}</h1>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def write_page(path: Path, title: str, parts: Iterable[str]) -> None:
    """Write a page, and say how large it is.

    Raises:
        UserError: it cannot be written.
    """
    content = page(title, parts).encode()
    write_atomically(str(path.parent), path.name, content)
    print(f"{path}: {len(content) / 1e6:.1f} MB")


def table(rows: Sequence[Sequence[str]], header: Sequence[str], *, label: str) -> str:
    """Rows of text, of which the first says what the row is of; numbers are aligned as such.

    Args:
        label: what it shows, for those who hear the page.
    """
    return table_of_html([[escape(text) for text in row] for row in rows], header, label=label)


def table_of_html(rows: Sequence[Sequence[str]], header: Sequence[str], *, label: str) -> str:
    """As `table`, of cells that are HTML."""

    def cell(content: str) -> str:
        kind = ' class="number"' if re.fullmatch(r"[-+]?[\d.,]+ ?%?", content) else ""
        return f"<td{kind}>{content}</td>"

    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in header)
    lines = (f'<th scope="row">{first}</th>{"".join(map(cell, others))}' for first, *others in rows)
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    # A part that scrolls is reached by the keyboard, too.
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(label)}"><table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def card(
    heading: str,
    samples_S: torch.Tensor,
    sample_rate_hz: int,
    lines: Sequence[str] = (),
    mark_seconds: float | None = None,
) -> str:
    """A clip with its player, its spectrogram and what is said about it.

    Args:
        heading, lines: as text.
        samples_S: mono.
        mark_seconds: where a line is drawn, such as the end of a prompt.
    """
    said = "".join(f"<p>{escape(line)}</p>" for line in lines)
    picture = _data("image/webp", _webp(spectrogram(samples_S, sample_rate_hz, mark_seconds)))
    seen = f"Spectrogram of {heading}, {len(samples_S) / sample_rate_hz:.1f} s, 0 to {sample_rate_hz / 2000:g} kHz"
    return (
        f'<section class="card"><h4>{escape(heading)}</h4>\n{player(heading, samples_S, sample_rate_hz)}\n'
        f'<img class="sound" alt="{escape(seen)}" src="{picture}">\n'
        f"{said}</section>"
    )


def cards(of_clips: Iterable[str]) -> str:
    """Cards side by side, as many as there is room for."""
    return '<div class="cards">\n' + "\n".join(of_clips) + "\n</div>"


def player(name: str, samples_S: torch.Tensor, sample_rate_hz: int) -> str:
    """A player of a clip as MP3, which every browser plays."""
    stream = io.BytesIO()
    samples = samples_S.clamp(-1, 1).numpy()
    soundfile.write(
        stream, samples, sample_rate_hz, format="MP3", subtype="MPEG_LAYER_III", compression_level=MP3_QUALITY
    )
    source = _data("audio/mpeg", stream.getvalue())
    return f'<audio controls preload="metadata" aria-label="{escape(name)}" src="{source}"></audio>'


def chart(figure: Figure, description: str) -> str:
    """A picture of matplotlib's, which is closed.

    Args:
        description: what one sees on it.
    """
    stream = io.BytesIO()
    figure.savefig(stream, dpi=100, format="png")
    plt.close(figure)
    return picture(stream.getvalue(), description)


def picture(png: bytes, description: str) -> str:
    return f'<img class="chart" alt="{escape(description)}" src="{_data("image/png", png)}">'


def spectrogram(samples_S: torch.Tensor, sample_rate_hz: int, mark_seconds: float | None = None) -> np.ndarray:
    """Level over time and frequency, up to half the sample rate, as colors (rows, columns, 3) in uint8.

    The scale is the same for all clips.
    """
    samples_S = torch.nn.functional.pad(samples_S, (0, max(0, WINDOW - len(samples_S))))
    magnitude_FT = torchaudio.transforms.Spectrogram(WINDOW, hop_length=HOP, power=1.0)(samples_S)
    level_FT = 20 * magnitude_FT.clamp(min=1e-6).log10()
    share_FT = ((level_FT - TOP_DB + RANGE_DB) / RANGE_DB).clamp(0, 1).flip(0).numpy()
    colors = (plt.get_cmap("magma")(share_FT)[..., :3] * 255).astype(np.uint8)
    if mark_seconds is not None:
        colors[:, round(mark_seconds * sample_rate_hz / HOP) :][:, :MARK_COLUMNS] = MARK_COLOR
    return colors


def resized(colors: np.ndarray) -> np.ndarray:
    """A spectrogram of `SPECTROGRAM_ROWS`, and as long as it was up to `MAX_COLUMNS`."""
    size = min(colors.shape[1], MAX_COLUMNS), SPECTROGRAM_ROWS
    return np.asarray(Image.fromarray(colors).resize(size, Image.Resampling.BOX))


def _webp(colors: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(resized(colors)).save(stream, "WEBP", quality=60)
    return stream.getvalue()


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
