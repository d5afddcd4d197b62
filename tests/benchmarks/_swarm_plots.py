"""The plots of `ulm bench swarm`: PNG files, and one page that has them all with the table."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.report import html
from pipelines.swarm.rule import Measured, Rule

CENTRE = ("trial", 50, 8, 0.5)  # size, tokens per parameter, experts, seed share
COLOURS = {"route": "#3b6ea8", "mixture": "#c98a2b", "oracle": "#4f9a6b", "random": "#c2504a", "dense": "#6a6f7a"}
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e2dd",
    "axes.edgecolor": "#b8b5ae",
    "axes.axisbelow": True,
}
LEGEND: dict[str, Any] = {"facecolor": "white", "edgecolor": "none", "framealpha": 0.9}
SIZE_INCHES, DOTS_PER_INCH = (6.4, 4.0), 150


@dataclass(frozen=True)
class Point:
    """One trained swarm: its setting, perplexity ratios to dense by column, bits per byte by domain and column."""

    size: str
    tokens_per_parameter: float
    experts: int
    seed_share: float
    seed: int
    parameters: int
    ratios: dict[str, float]
    bits_per_byte: dict[str, dict[str, float | None]]

    def differs_in(self, field: str | None) -> bool:
        """Whether this is the centre, but for at most one field."""
        found = (self.size, round(self.tokens_per_parameter), self.experts, self.seed_share)
        names = ("size", "tokens_per_parameter", "experts", "seed_share")
        return all(a == b or name == field for name, a, b in zip(names, found, CENTRE, strict=True))


def draw(folder: Path, points: Sequence[Point], measured: Sequence[Measured], rows: Sequence[str]) -> None:
    """Write the plots that these points give, and index.html; `rows` is the table in Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    plots: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "tokens": ("Perplexity against dense, by tokens per parameter", lambda axes: _tokens(axes, points, measured)),
        "experts": ("By number of experts, 50 tokens per parameter", lambda axes: _axis(axes, points, "experts")),
        "seed_share": ("By the seed's share of the tokens", lambda axes: _axis(axes, points, "seed_share")),
        "domains": ("Bits per byte of each domain, at the centre", lambda axes: _domains(axes, points)),
    }
    shown = []
    for name, (title, drawn) in plots.items():
        path = folder / f"{name}.png"
        if _png(path, drawn):
            data = base64.b64encode(path.read_bytes()).decode()
            image = f'<img src="data:image/png;base64,{data}" alt="{html.plain(title)}" style="width:100%">'
            shown.append(f"<figure><figcaption>{html.text(title)}</figcaption>{image}</figure>")
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    body = "<h1>The swarm against one dense model</h1>"
    body += "<p>Perplexity ratios to dense, at equal training tokens; below 1 the swarm is better.</p>"
    body += html.section("Figures", f"<div class=plots>{''.join(shown)}</div>")
    body += html.section("All results", html.table(cells[0], cells[2:]))
    (folder / "index.html").write_text(html.document("The swarm", body), encoding="utf-8")


def _png(path: Path, drawn: Callable[[Any], bool]) -> bool:
    """Write the plot, unless there is nothing to draw."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=SIZE_INCHES, dpi=DOTS_PER_INCH, layout="constrained")
        if drawn(figure.add_subplot()):
            figure.savefig(path, metadata={"Software": None})  # equal figures give equal bytes
            return True
    return False


def _tokens(axes: Any, points: Sequence[Point], measured: Sequence[Measured]) -> bool:
    """Ratios by tokens per parameter, the rule's forecast between them, and where it crosses 1."""
    if not _curves(axes, points, "tokens_per_parameter", needed=1):
        return False
    at_centre = [it for it in measured if _is_near_centre(it)]
    if at_centre:
        rule, setting = Rule.fit(measured), at_centre[0].setting
        xs = np.geomspace(0.8, 150, 120)
        ahead = [rule.forecast(replace(setting, tokens_per_parameter=float(x))) for x in xs]
        low, high = [it.low for it in ahead], [it.high for it in ahead]
        axes.fill_between(xs, low, high, color=COLOURS["route"], alpha=0.13, linewidth=0, label="rule: nine of ten")
        start = rule.pays_from(setting)
        if start is not None and xs[0] < start < xs[-1]:
            axes.axvline(start, color=COLOURS["dense"], linestyle=":", linewidth=1.2)
            axes.annotate(f"pays from {start:.1f}", (start, axes.get_ylim()[0]), (4, 4), textcoords="offset points")
    axes.set(xscale="log", xlabel="training tokens per parameter", ylabel="perplexity / dense")
    ticks = (1, 2, 5, 10, 20, 50, 100)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.legend(**LEGEND)
    return True


def _is_near_centre(it: Measured) -> bool:
    _, tokens, experts, share = CENTRE
    of = it.setting
    near = math.isclose(of.tokens_per_parameter, tokens, rel_tol=0.02)
    return near and (of.experts, of.seed_share) == (experts, share) and it.ratio < 1


def _axis(axes: Any, points: Sequence[Point], field: str) -> bool:
    """Ratios by one setting."""
    if not _curves(axes, points, field, needed=2):
        return False
    values = sorted({getattr(point, field) for point in points if point.differs_in(field)})
    axes.set(xlabel=field.replace("_", " "), ylabel="perplexity / dense")
    if field == "experts":
        axes.set_xscale("log", base=2)
    axes.set_xticks(values, [f"{v:.0%}" if isinstance(v, float) else str(v) for v in values])
    axes.minorticks_off()
    axes.legend(**LEGEND)
    return True


def _curves(axes: Any, points: Sequence[Point], field: str, needed: int) -> bool:
    """Each column's ratios by a field, the mean over seeds as a line; whether there were points enough."""
    mine = [point for point in points if point.differs_in(field)]
    if len({getattr(point, field) for point in mine}) < needed:
        return False
    axes.axhline(1, color=COLOURS["dense"], linewidth=1.2)
    for column in ("route", "mixture", "oracle", "random"):
        by: dict[float, list[float]] = {}
        for point in mine:
            if column in point.ratios:
                by.setdefault(getattr(point, field), []).append(point.ratios[column])
        at = sorted(by)
        if column == "random" and len(at) < min(2, needed):  # one point of a control would only flatten the rest
            continue
        colour = COLOURS[column]
        axes.plot(at, [float(np.mean(by[x])) for x in at], "-o", color=colour, markersize=4, label=column)
        axes.plot([x for x in at for _ in by[x]], [y for x in at for y in by[x]], ".", color=colour, alpha=0.4)
    return True


def _domains(axes: Any, points: Sequence[Point]) -> bool:
    """Bars of bits per byte, by domain, at the centre; the mean over its seeds."""
    mine = [point for point in points if point.differs_in(None)]
    if not mine:
        return False
    domains = sorted(mine[0].bits_per_byte)
    columns = [name for name in ("dense", "route", "mixture", "random") if mine[0].bits_per_byte[domains[0]].get(name)]
    width = 0.8 / len(columns)
    for number, column in enumerate(columns):
        heights = [float(np.mean([point.bits_per_byte[domain][column] for point in mine])) for domain in domains]
        at = np.arange(len(domains)) + (number - (len(columns) - 1) / 2) * width
        axes.bar(at, heights, width, color=COLOURS[column], label=column)
    axes.set_xticks(range(len(domains)), domains, rotation=20, ha="right")
    axes.grid(visible=False, axis="x")
    axes.set_ylabel("bits per byte, lower is better")
    axes.set_ylim(top=axes.get_ylim()[1] * 1.12)
    axes.legend(frameon=False, ncols=len(columns), loc="upper center")
    return True
