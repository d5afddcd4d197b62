"""The plots of a corpus report, as SVG that takes its colours from the page: equal figures give equal bytes."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# What is drawn in these colours takes the page's, so that one drawing serves light and dark.
INK, GRID = "#0a0b01", "#0a0b02"
SPLIT_COLOURS = {"train": "#0a0b03", "val": "#0a0b04", "test": "#0a0b05"}
_VARIABLES = {INK: "--soft", GRID: "--line", "#0a0b03": "--c0", "#0a0b04": "--c1", "#0a0b05": "--c2"}
_STYLE = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "text.parse_math": False,
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
}


def length_plot(lengths: Mapping[str, Any], unit: str) -> str:
    """Share of each split's documents by length, on a logarithmic axis."""

    def draw(axes: Any) -> None:
        for split, counts in lengths["counts"].items():
            shares = [100 * count / sum(counts) for count in counts]
            colour, is_train = SPLIT_COLOURS[split], split == "train"
            if is_train:
                axes.stairs(shares, lengths["edges"], fill=True, color=colour, alpha=0.25)
            axes.stairs(shares, lengths["edges"], color=colour, linewidth=1.8, label=split)
        axes.set(xscale="log", xlabel=f"{unit} of a document", ylabel="% of the split's documents")
        axes.legend(frameon=False, loc="upper right", handlelength=1.2)

    return _svg(draw, f"Histogram of document lengths in {unit}, by split")


def cluster_size_plot(sizes: Mapping[str, int]) -> str:
    """How many clusters of near duplicates have how many documents, on logarithmic axes."""

    def draw(axes: Any) -> None:
        points = sorted((int(size), count) for size, count in sizes.items())
        x, y = zip(*points, strict=True)
        axes.vlines(x, 0.7, y, color=SPLIT_COLOURS["train"], linewidth=1.2, alpha=0.35)
        axes.plot(x, y, "o", color=SPLIT_COLOURS["train"], markersize=4)
        axes.set(xscale="log", yscale="log", xlabel="documents of a cluster", ylabel="clusters")
        axes.set_ylim(bottom=0.7)
        right = max(x[-1] * 1.5, 20)
        marks = (1, 2, 3, 5) if right < 1_000 else (1, 3)
        ticks = {2, *(mark * 10**power for power in range(12) for mark in marks)}  # most clusters have two documents
        axes.set_xticks(sorted(tick for tick in ticks if 1 < tick <= right))
        axes.set_xlim(left=1.5, right=right)

    return _svg(draw, "Clusters of near duplicates by size")


def short(value: float) -> str:
    """A count as an axis says it: 20, 1k, 3M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:g}{unit}"
    return f"{value:g}"


def _svg(draw: Callable[[Any], None], title: str) -> str:
    """An inline <svg> of one pair of axes, as wide as a phone."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": title}), io.StringIO() as file:
        figure = Figure(figsize=(4.6, 2.7), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() == "log" and not isinstance(axis.get_major_locator(), FixedLocator):
                axis.set_major_locator(LogLocator(subs=(1, 3), numticks=12))
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        axes.tick_params(length=0)
        axes.grid(axis="y", linewidth=0.8)
        axes.set_axisbelow(True)
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        drawn = file.getvalue()
    return _inline(drawn, title)


def _inline(drawn: str, title: str) -> str:
    """A drawing without what a page of its own needs: prologue, fixed size, names of groups, fonts."""
    body = drawn[drawn.index("<svg") :]
    box = re.search(r'viewBox="[^"]*"', body)
    assert box is not None, "matplotlib writes one"
    body = body[body.index(">") + 1 :]
    replacements: Sequence[tuple[str, str]] = (
        (r"<metadata>.*?</metadata>", ""),
        (r'<g id="[^"]*"', "<g"),
        (r"'DejaVu Sans'[^;\"]*", "inherit"),
        (r"\n\s*", "\n"),
    )
    for pattern, replacement in replacements:
        body = re.sub(pattern, replacement, body, flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, f"var({variable})")
    return f'<svg {box[0]} role="img" aria-label="{title}">{body}'
