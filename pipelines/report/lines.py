"""Line plots as HTML: the curves are an SVG that stretches, the labels are text of the page's own size at any width.

Drawn here rather than by matplotlib, whose import and drawing take a second: these are made while training goes on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.report.html import plain

Floats = NDArray[np.float64]

BINS = 400  # of the width: more points than two in each are not seen
WIDTH, HEIGHT = 1000, 400  # of the SVG's own units
NUM_TICKS = 5


@dataclass(frozen=True)
class Line:
    """A curve. x ascends; where y is not finite the curve is broken."""

    x: Floats
    y: Floats
    colour: str = "--c0"
    is_faint: bool = False
    has_dots: bool = False


@dataclass(frozen=True)
class Mark:
    """A vertical line at x, labelled, with what is read when one points at it."""

    x: float
    label: str
    about: str
    colour: str = "--soft"


def plot(
    lines: Sequence[Line],
    title: str,
    *,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    is_log: bool = False,
    marks: Sequence[Mark] = (),
) -> str:
    """The curves over one pair of axes; '' where nothing is finite. Beyond `y_range` they are cut off.

    `title` is for those who cannot see it.
    """
    lines = [thinned(line) for line in lines]
    values = np.concatenate([line.y for line in lines] or [np.empty(0)])
    usable = np.isfinite(values) & ((values > 0) | (not is_log))
    if not usable.any():
        return ""
    at = np.concatenate([line.x for line in lines])
    left, right = x_range or (at.min(), at.max())
    if right <= left:
        left, right = left - 1, right + 1
    low, high = y_range or (values[usable].min(), values[usable].max())
    low, high, y_ticks = _log_axis(low, high) if is_log else _axis(low, high)

    def across(x: Floats | float) -> Floats:
        return (np.asarray(x) - left) / (right - left)

    def up(y: Floats | float) -> Floats:
        if is_log:
            with np.errstate(divide="ignore", invalid="ignore"):
                return (np.log(y) - math.log(low)) / math.log(high / low)
        return (np.asarray(y) - low) / (high - low)

    drawn = [f'<path d="M0,{_px(1 - up(tick), HEIGHT)}H{WIDTH}" stroke="var(--line)"/>' for tick in y_ticks]
    drawn += [
        f'<path d="M{_px(across(mark.x), WIDTH)},0V{HEIGHT}" stroke="var({mark.colour})" stroke-width="1.5" '
        f'stroke-dasharray="4 4"><title>{plain(mark.about)}</title></path>'
        for mark in marks
    ]
    drawn += [_curve(line, across(line.x) * WIDTH, (1 - up(line.y)) * HEIGHT) for line in lines]
    x_ticks = [tick for tick in _axis(left, right)[2] if left <= tick <= right]
    labels = [f'<span class=y style="bottom:{100 * float(up(tick)):.2f}%">{short(tick)}</span>' for tick in y_ticks]
    labels += [f'<span class=x style="left:{100 * float(across(tick)):.2f}%">{short(tick)}</span>' for tick in x_ticks]
    labels += _mark_labels([(float(across(mark.x)), mark) for mark in marks])
    svg = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" aria-label="{plain(title)}">'
        f"{''.join(drawn)}</svg>"
    )
    return f"<div class=plot>{svg}{''.join(labels)}</div>"


def thinned(line: Line, bins: int = BINS) -> Line:
    """The lowest and the highest point of each of equally wide bins, where the line has more than two in each."""
    x, y = line.x, line.y
    if len(x) <= 2 * bins:
        return line
    edges = np.searchsorted(x, np.linspace(x[0], x[-1], bins + 1)[1:-1])
    kept: list[int] = []
    for start, end in zip([0, *edges], [*edges, len(x)], strict=True):
        mine = np.flatnonzero(np.isfinite(y[start:end])) + start
        if len(mine):
            kept += sorted({int(mine[np.argmin(y[mine])]), int(mine[np.argmax(y[mine])])})
    return Line(x[kept], y[kept], line.colour, line.is_faint, line.has_dots)


def smoothed(y: Floats, window: int) -> Floats:
    """The mean of `window` values around each, of those that are finite; nearer to the ends of fewer."""
    finite = np.isfinite(y)
    sums, counts = (np.concatenate([[0.0], np.cumsum(v)]) for v in (np.where(finite, y, 0.0), finite))
    at = np.arange(len(y))
    start, end = np.maximum(at - window // 2, 0), np.minimum(at + (window + 1) // 2, len(y))
    with np.errstate(invalid="ignore"):
        means: Floats = (sums[end] - sums[start]) / (counts[end] - counts[start])
    return means


def short(value: float) -> str:
    """A number as an axis says it: 0.004, 20, 1.5k, 3M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.6g}{unit}"
    return f"{value:.6g}"


def _axis(low: float, high: float) -> tuple[float, float, list[float]]:
    """Round ticks, and the ends of the axis: the values' own, with a little room."""
    span = high - low or abs(high) * 0.1 or 1.0
    power = 10.0 ** math.floor(math.log10(span / NUM_TICKS))
    tick = next(power * n for n in (1, 2, 5, 10) if power * n >= span / NUM_TICKS)
    low, high = (0.0 if 0 <= low < tick else low - 0.04 * span), high + 0.06 * span
    ticks = [round(n * tick, 12) for n in range(math.ceil(low / tick), math.floor(high / tick) + 1)]
    return low, high, ticks


def _log_axis(low: float, high: float) -> tuple[float, float, list[float]]:
    """The same on a logarithmic axis."""
    low, high = low / 1.15, high * 1.15
    for marks in ((1, 2, 5), (1, 3), (1,)):
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [mark * 10.0**power for power in powers for mark in marks if low <= mark * 10.0**power <= high]
        if len(ticks) <= NUM_TICKS + 2:
            break
    return low, high, ticks


def _px(share: Floats | float, whole: int) -> str:
    return f"{float(share) * whole:.1f}"


def _curve(line: Line, x: Floats, y: Floats) -> str:
    """The path of a curve, in the SVG's units; dots are strokes of no length, which stay round when it stretches."""
    points, pen_is_up = [], True
    for px, py in zip(x.tolist(), y.tolist(), strict=True):
        if math.isfinite(py):
            # far outside is as good as a little outside, and keeps the numbers short
            points.append(f"{'M' if pen_is_up else 'L'}{px:.1f},{min(max(py, -HEIGHT), 2 * HEIGHT):.1f}")
        pen_is_up = not math.isfinite(py)
    style = 'stroke-width="1" stroke-opacity=".35"' if line.is_faint else 'stroke-width="2"'
    path = f'<path d="{"".join(points)}" stroke="var({line.colour})" {style}/>'
    if line.has_dots or len(points) == 1:
        dots = "".join(f"{point.replace('L', 'M')}h0" for point in points)
        path += f'<path d="{dots}" stroke="var({line.colour})" stroke-width="6"/>'
    return path


def _mark_labels(placed: Sequence[tuple[float, Mark]]) -> list[str]:
    """Labels over the marks; those of marks so close that they would lie on each other stand together."""
    together: list[tuple[float, list[str]]] = []
    for share, mark in sorted(placed, key=lambda pair: pair[0]):
        if together and share - together[-1][0] < 0.025:
            together[-1][1].append(mark.label)
        else:
            together.append((share, [mark.label]))
    return [
        f'<span class=m style="left:{100 * share:.2f}%">{plain(", ".join(labels[:3]))}{"…" * (len(labels) > 3)}</span>'
        for share, labels in together
    ]
