"""Sources listed and read without the stages that follow, for the tests of both."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.corpus.reading.read import Reading, Record, read_unit
from pipelines.corpus.reading.unit import Unit
from pipelines.corpus.sources import Listing, list_sources
from ulm.recipes.base import validate
from ulm.recipes.corpus import CorpusRecipe, Source

MAX_BYTES = 10_000_000
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def sources_of(*sources: dict[str, Any]) -> list[Source]:
    """The sources of a recipe."""
    return validate(CorpusRecipe, {"name": "c", "sources": list(sources)}).sources


def listing_of(*sources: dict[str, Any], near: Path, max_bytes: int = MAX_BYTES) -> Listing:
    """What sources mean, beside a recipe in `near`."""
    return list_sources(sources_of(*sources), near=near, root=near / "root", max_bytes=max_bytes)


def records_of(near: Path, max_bytes: int = MAX_BYTES, **source: Any) -> list[tuple[Unit, Record]]:
    """Every record of a source, with its unit."""
    return list(_records(near, max_bytes, source))


def _records(near: Path, max_bytes: int, source: dict[str, Any]) -> Iterator[tuple[Unit, Record]]:
    [section] = sources_of(source)
    for unit in listing_of(source, near=near, max_bytes=max_bytes).units:
        for record in read_unit(unit, section, Reading(), max_bytes, TEMPLATE):
            yield unit, record


def read(near: Path, max_bytes: int = MAX_BYTES, **source: Any) -> list[str]:
    """The text of every record of a source, or its reason in brackets up to the first colon."""
    records = (record for _, record in _records(near, max_bytes, source))
    return [f"[{r.reason.split(':')[0]}]" if r.reason is not None else r.text or "" for r in records]
