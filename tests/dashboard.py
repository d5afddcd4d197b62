"""The Grafana dashboard as its tests read it: panels with their queries, variables filled in."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[1] / "deploy" / "grafana" / "dashboard.json"
RATE_INTERVAL = "$__rate_interval"  # Grafana's own: four scrapes


@dataclass(frozen=True)
class Panel:
    """A panel and the row that it stands in; of a row, the row's own title."""

    row: str
    fields: dict[str, Any]

    @property
    def title(self) -> str:
        return str(self.fields["title"])

    @property
    def targets(self) -> list[dict[str, Any]]:
        return list(self.fields["targets"])

    def queries(self, rate_interval: str = "1m") -> list[str]:
        """As Grafana sends them with All chosen in every list."""
        return [filled(target["expr"], rate_interval) for target in self.targets]


def board() -> dict[str, Any]:
    return dict(json.loads(FILE.read_text(encoding="utf-8")))


def panels() -> list[Panel]:
    """All that are no rows."""
    found, row = [], ""
    for fields in board()["panels"]:
        if fields["type"] == "row":
            row = fields["title"]
        else:
            found.append(Panel(row, fields))
    return found


def filled(expression: str, rate_interval: str = "1m") -> str:
    """A query with its variables replaced."""
    expression = expression.replace(RATE_INTERVAL, rate_interval)
    for variable in board()["templating"]["list"]:
        if "allValue" in variable:
            expression = expression.replace(f"${variable['name']}", variable["allValue"])
    return expression
