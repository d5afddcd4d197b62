"""A page of docs/ as its tests read it: sections and their tables."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Page:
    """A page of Markdown."""

    text: str

    @classmethod
    def read(cls, name: str) -> Page:
        return cls((Path(__file__).parents[1] / "docs" / name).read_text(encoding="utf-8"))

    def section(self, heading: str) -> str:
        text = self.text.partition(f"\n## {heading}\n")[2]
        assert text, heading
        return text.partition("\n## ")[0]

    def tables(self, heading: str) -> list[list[list[str]]]:
        """The rows of a section's tables, as cells, without their heads."""
        found = re.findall(r"(?:^\|.*\n?)+", self.section(heading), re.MULTILINE)
        rows = [[line.strip("|").split("|") for line in table.splitlines()[2:]] for table in found]
        return [[[cell.strip() for cell in row] for row in table] for table in rows]
