"""How a benchmark reports: one JSON line per figure, `met` computed from the goal."""

from __future__ import annotations

import json
import operator
import statistics
import sys
from collections.abc import Sequence


class Failed(Exception):  # noqa: N818  of a process that was to be measured; its figure says so
    """What the process said last."""


_COMPARE = {">=": operator.ge, "<=": operator.le}


def report(
    figure: str,
    values: Sequence[float],
    unit: str,
    *,
    goal: str | None = None,
    peer: str | None = None,
    peer_values: Sequence[float] = (),
    note: str | None = None,
) -> None:
    """Print a figure: the median of its runs, and of its ratio to the peer's where there is one.

    `values` and `peer_values` are pairs, taken by turns. Without values it could not be measured: `note` says why.
    """
    ratios = [v / p for v, p in zip(values, peer_values, strict=True)] if peer else []
    value = statistics.median(values) if values else None
    ratio = statistics.median(ratios) if ratios else None
    bounded = ratio if peer else value
    met = None
    if goal is not None:
        sign, limit = goal.split()
        met = bounded is not None and _COMPARE[sign](bounded, float(limit))
    spread = [min(ratios or values), max(ratios or values)] if values else None
    line = {
        "figure": figure,
        "value": _round(value),
        "unit": unit,
        "peer": peer,
        "ratio": _round(ratio),
        "goal": goal,
        "met": met,
        "runs": len(values),
        "spread": spread and [_round(v) for v in spread],
    }
    if peer_values:
        line["peer_value"] = _round(statistics.median(peer_values))
    if note:
        line["note"] = note
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def _round(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")
