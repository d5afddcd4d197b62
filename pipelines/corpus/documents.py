"""The table of documents between the stages: read and cleaned by many workers, judged in one place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.corpus.clean import clean_text
from pipelines.corpus.dedup import KEY_BYTES, content_key, is_first
from pipelines.corpus.read import Reading, read_unit
from pipelines.corpus.sources import Unit
from pipelines.corpus.split import assign
from ulm.corpus.manifest import SPLITS
from ulm.recipes.corpus import Clean, Split

SCHEMA = pa.schema(
    [
        ("unit", pa.int32()),
        ("index", pa.int32()),  # of the row in its unit
        ("offset", pa.int64()),
        ("line", pa.int32()),
        ("text", pa.large_string()),
        ("key", pa.binary(KEY_BYTES)),  # null for what is no document
        ("num_bytes", pa.int64()),
        ("reason", pa.string()),  # null for documents
        ("digest", pa.string()),  # of the unit, on its last row alone, whose `line` is the unit's number of lines
    ]
)
LEAN = [name for name in SCHEMA.names if name != "text"]
TABLE_BYTES = 16 << 20  # of text in one table
CLEAN_REASONS = {"empty", "too_short"}
MAX_LISTED = 1_000  # dropped files and lines that a manifest names; all are counted


def read_documents(units: list[tuple[int, Unit]], clean: Clean) -> Iterator[pa.Table]:
    """Read and clean units; tables of SCHEMA, one row per record and one last row per unit."""
    rows: list[tuple[Any, ...]] = []
    filled = 0
    for number, unit in units:
        reading, index = Reading(), 0
        for record in read_unit(unit, reading):
            text, reason = record.text, record.reason
            if text is not None:
                text, reason = clean_text(text, clean)
            if reason is None and text is not None:
                size = len(text.encode())
                rows.append((number, index, record.offset, record.line, text, content_key(text), size, None, None))
                filled += size
            else:
                rows.append((number, index, record.offset, record.line, None, None, 0, reason, None))
            index += 1
            if filled >= TABLE_BYTES or len(rows) >= 100_000:
                yield _table(rows)
                rows, filled = [], 0
        rows.append((number, index, 0, reading.num_lines, None, None, 0, None, reading.hash.hexdigest()))
    yield _table(rows)


def _table(rows: list[tuple[Any, ...]]) -> pa.Table:
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(SCHEMA)
    return pa.table([pa.array(c, t) for c, t in zip(columns, SCHEMA.types, strict=True)], schema=SCHEMA)


@dataclass(frozen=True)
class Judged:
    """What becomes of each row that was read: the decisions, and the account of them."""

    rows: pa.Table  # LEAN columns, in corpus order
    split: NDArray[np.int8]  # index into SPLITS per row; -1 for what is dropped and for units' last rows
    first_row: NDArray[np.int64]  # of each unit
    stages: list[dict[str, Any]]
    dropped: Counter[str]
    listed: list[dict[str, Any]] = field(repr=False)

    @property
    def num_in(self) -> int:
        """Documents that there were."""
        return int(self.stages[0]["in"])

    @property
    def num_kept(self) -> int:
        """Documents that are left."""
        return int((self.split >= 0).sum())

    @cached_property
    def num_bytes(self) -> NDArray[np.int64]:
        """UTF-8 bytes of each row's text."""
        return _numpy(self.rows, "num_bytes")

    @cached_property
    def keys(self) -> NDArray[np.bytes_]:
        """Of each row; zeros where it is no document."""
        return _keys(self.rows)

    def row_of(self, unit: NDArray[np.int32], index: NDArray[np.int32]) -> NDArray[np.int64]:
        """Row numbers of rows of units."""
        return self.first_row[unit] + index

    def source_digests(self, units: list[Unit], num_sources: int) -> list[list[str]]:
        """Content digests of the units of each source."""
        found: list[list[str]] = [[] for _ in range(num_sources)]
        last = self.rows.filter(self.rows["digest"].is_valid())
        for unit, digest in zip(last["unit"].to_pylist(), last["digest"].to_pylist(), strict=True):
            found[units[unit].source].append(digest)
        return found


def judge(rows: pa.Table, units: list[Unit], names: list[str], clean: Clean, split: Split) -> Judged:
    """Exact duplicates dropped, splits assigned, everything counted."""
    rows = rows.combine_chunks()
    unit, index = _numpy(rows, "unit"), _numpy(rows, "index")
    assert (np.lexsort((index, unit)) == np.arange(len(unit))).all(), "readers must keep the order"
    document = _numpy(rows, "key", is_valid=True)
    faulty = _numpy(rows, "reason", is_valid=True)
    keys = _keys(rows)[document]
    kept = is_first(keys) if clean.duplicate_exact else np.ones(len(keys), dtype=np.bool_)
    own = np.array([-1 if u.split is None else SPLITS.index(u.split) for u in units], dtype=np.int8)
    decision = np.full(len(unit), -1, dtype=np.int8)
    decision[np.flatnonzero(document)[kept]] = assign(keys[kept], own[unit[document]][kept], split)
    first_row = np.searchsorted(unit, np.arange(len(units)))

    faults = rows.filter(pa.array(faulty))
    duplicates = rows.take(np.flatnonzero(document)[~kept])
    stages = _stages(faults, len(keys), len(duplicates) if clean.duplicate_exact else None)
    dropped = sum((Counter[str](stage["dropped"]) for stage in stages), Counter[str]())
    listed = _listed(faults, rows, units, names) + _listed(duplicates, rows, units, names, "duplicate_exact")
    return Judged(rows, decision, first_row, stages, dropped, listed[:MAX_LISTED])


def _stages(faults: pa.Table, num_documents: int, num_duplicates: int | None) -> list[dict[str, Any]]:
    """Documents in and out of each stage, with the reasons of those between; None: duplicates are kept."""
    counts = Counter(reason.split(":")[0] for reason in faults["reason"].to_pylist())
    of_clean = Counter({reason: counts.pop(reason) for reason in CLEAN_REASONS & set(counts)})
    parts = [("read", counts), ("clean", of_clean)]
    if num_duplicates is not None:
        parts.append(("duplicate_exact", Counter({"duplicate_exact": num_duplicates} if num_duplicates else {})))
    num = num_documents + len(faults)
    stages = []
    for stage, dropped in parts:
        stages.append(
            {"stage": stage, "in": num, "out": num - dropped.total(), "dropped": dict(sorted(dropped.items()))}
        )
        num -= dropped.total()
    return stages


def _listed(
    gone: pa.Table, rows: pa.Table, units: list[Unit], names: list[str], reason: str | None = None
) -> list[dict[str, Any]]:
    """Names and reasons of the first MAX_LISTED rows; a line is counted over the parts of its file."""
    last = rows.filter(rows["digest"].is_valid())
    lines_before: dict[int, int] = {}
    total = 0
    for unit, num_lines in zip(last["unit"].to_pylist(), last["line"].to_pylist(), strict=True):
        total = 0 if units[unit].start == 0 else total
        lines_before[unit] = total
        total += num_lines
    found = []
    for row in gone.slice(0, MAX_LISTED).to_pylist():
        unit = units[row["unit"]]
        place = f"{unit.path}:{lines_before[row['unit']] + row['line']}" if row["line"] else unit.path
        rows_of = {"row": row["offset"]} if unit.format in ("parquet", "dataset") else {}
        found.append({"source": names[unit.source], "path": place, **rows_of, "reason": reason or row["reason"]})
    return found


def choose_sample(judged: Judged, sample_bytes: int) -> NDArray[np.bool_]:
    """Rows that a tokenizer is trained on: train documents in the order of their keys, until there are bytes enough."""
    candidates = np.flatnonzero(judged.split == 0)
    if not len(candidates):
        candidates = np.flatnonzero(judged.split >= 0)
    order = candidates[np.argsort(judged.keys[candidates], kind="stable")]
    before = np.cumsum(judged.num_bytes[order]) - judged.num_bytes[order]
    chosen = np.zeros(len(judged.split), dtype=np.bool_)
    chosen[order[before < sample_bytes]] = True
    return chosen


def _numpy(rows: pa.Table, column: str, *, is_valid: bool = False) -> NDArray[Any]:
    values = rows[column].is_valid() if is_valid else rows[column]
    found: NDArray[Any] = values.to_numpy()
    return found


def _keys(rows: pa.Table) -> NDArray[np.bytes_]:
    import pyarrow.compute as pc

    keys = pc.fill_null(rows["key"], pa.scalar(bytes(KEY_BYTES), pa.binary(KEY_BYTES)))
    joined = b"".join(keys.to_pylist())
    return np.frombuffer(joined, dtype=f"S{KEY_BYTES}")
