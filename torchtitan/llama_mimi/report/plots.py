"""Plots of a report, readable on a phone that is 390 pixels wide."""

import math
import textwrap
from collections.abc import Mapping

from llama_mimi.report.document import pyplot, save_picture
from llama_mimi.report.estimates import Estimate

WIDTH_INCHES = 5.2
FONT_SIZE = 10.5


def forest(panels: Mapping[str, Mapping[str, Estimate]], title: str, *, is_difference: bool = False) -> bytes:
    """Return a PNG with a panel for each measure. A system has a line (interval), a tick (mean) and dots (seeds).

    With ``is_difference``, zero is in the middle of each panel, and the primary difference has a diamond.
    """
    plt = pyplot()
    systems = list(dict.fromkeys(system for lines in panels.values() for system in lines))
    labels = {system: textwrap.fill(system, 24) for system in systems}
    pitch = 0.1 + 0.17 * max(label.count("\n") + 1 for label in labels.values())
    heights = [pitch * len(lines) + 0.55 for lines in panels.values()]
    size = (WIDTH_INCHES, sum(heights) + 0.8)
    with plt.rc_context({"font.size": FONT_SIZE}):
        options = {"figsize": size, "squeeze": False, "layout": "constrained"}
        figure, grid = plt.subplots(len(panels), height_ratios=heights, **options)
        figure.suptitle(textwrap.fill(title, 50), fontsize=FONT_SIZE)
        has_seeds = any(len(one.seeds) > 1 for lines in panels.values() for one in lines.values())
        over = "seeds and items" if has_seeds else "items"
        caption = f"line: 95 % interval over {over}; tick: mean" + "; dots: seeds" * has_seeds
        if any(one.is_primary for lines in panels.values() for one in lines.values()):
            caption += "; diamond: primary difference"
        figure.supxlabel(textwrap.fill(caption, 70), fontsize=FONT_SIZE - 2)
        for axes, (heading, lines) in zip(grid[:, 0], panels.items(), strict=True):
            for place, (system, one) in enumerate(lines.items()):
                color = f"C{systems.index(system) % 10}"
                seeds = one.seeds if len(one.seeds) > 1 else ()
                axes.plot(seeds, [place] * len(seeds), "o", color=color, markersize=4, alpha=0.5)
                axes.plot(one.interval[1:3], [place, place], color=color, linewidth=2.5)
                mark = {"marker": "D", "markersize": 7} if one.is_primary else {"marker": "|", "markersize": 11}
                axes.plot(one.interval.mean, place, **mark, color=color, markeredgewidth=2.5)
            if is_difference:
                axes.axvline(0, color="black", linewidth=0.8)
                reach = max(map(abs, axes.get_xlim()))
                axes.set_xlim(-reach, reach)
            elif next(iter(lines.values())).measure.is_accuracy:
                axes.axvline(50, color="black", linewidth=0.8, linestyle=":")  # chance
                axes.set_xlim(0, 100)
            axes.set_yticks(range(len(lines)), [labels[name] + " *" * one.has_star for name, one in lines.items()])
            axes.set_ylim(len(lines) - 0.4, -0.6)
            axes.set_title(textwrap.fill(heading, 36), loc="left", fontsize=FONT_SIZE, weight="bold", pad=3)
            axes.locator_params(axis="x", nbins=5)
            if next(iter(lines.values())).measure.is_log:
                axes.xaxis.set_major_formatter(lambda value, _: f"{math.exp(value):.3g}")
            axes.grid(axis="x", alpha=0.3)
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.tick_params(axis="y", length=0)
    return save_picture(figure)
