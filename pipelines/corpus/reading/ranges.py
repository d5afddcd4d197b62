"""How a large file becomes units that many readers share, and which files hold the same rows as another."""

from __future__ import annotations

import codecs
import hashlib
import itertools
from dataclasses import replace
from typing import Any, BinaryIO

from pipelines.corpus.reading.formats import ROWS
from pipelines.corpus.reading.places import open_file
from pipelines.corpus.reading.streams import HEAD_BYTES, MAGIC, UnusableError, char_border, codec_of, is_binary
from pipelines.corpus.reading.tables import Fault, Row, columns_of, is_array, rows_of
from pipelines.corpus.reading.unit import Unit, document_rule
from ulm.recipes.corpus import Source

# The parts that files and datasets are read in. They are in the corpus digest: a change makes new digests.
PART_BYTES = 4 << 20


def parts(unit: Unit, source: Source, max_bytes: int) -> list[Unit]:
    """The unit, or parts of it: row groups of parquet, byte ranges of lines, pieces of a file that is one document."""
    if unit.format == "parquet":
        return _row_groups(unit)
    rule = document_rule(unit.format, source)
    by_line = unit.format in ("jsonl", "tsv") or (rule == "line" and unit.format not in ROWS)
    by_piece = rule == "file" and unit.format in ("txt", "md", "code") and not source.html
    bound = PART_BYTES if by_line else max_bytes
    if unit.compression or unit.size <= bound or not (by_line or by_piece) or source.encoding == "auto":
        return [unit]
    try:
        with open_file(unit.file) as file:
            head = file.read(HEAD_BYTES)
            if codec_of(head, source.encoding) or head.startswith(MAGIC) or is_binary(head):
                return [unit]
            if unit.format == "jsonl" and is_array(head):
                return [unit]
            cuts = [0]
            if by_line:
                cuts += range(PART_BYTES, unit.size, PART_BYTES)
            else:
                mark = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
                while unit.size - max(cuts[-1], mark) > max_bytes:
                    cuts.append(_char_border(file, max(cuts[-1], mark) + max_bytes))
    except OSError:
        return [unit]  # the reader says what is wrong with it
    ranges = itertools.pairwise([*cuts, unit.size])
    return [
        replace(unit, start=start, end=end, size=end - start, piece=0 if by_line else number)
        for number, (start, end) in enumerate(ranges)
    ]


def _char_border(file: BinaryIO, end: int) -> int:
    file.seek(end - 3)
    return end - 3 + char_border(file.read(4), 3)


def _row_groups(unit: Unit) -> list[Unit]:
    """Runs of row groups of about PART_BYTES."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open_file(unit.file) as file:
            metadata = pq.read_metadata(file)
    except (pa.ArrowException, OSError):
        return [unit]  # the reader says what is wrong with it
    found: list[Unit] = []
    start = first_row = row = size = 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        if size and size + group.total_byte_size > PART_BYTES:
            found.append(replace(unit, start=start, end=number, row=first_row, size=size))
            start, first_row, size = number, row, 0
        size += group.total_byte_size
        row += group.num_rows
    return [*found, replace(unit, start=start, end=metadata.num_row_groups, row=first_row, size=size)]


def without_twins(units: list[Unit], source: Source) -> tuple[list[Unit], list[tuple[Unit, Unit]]]:
    """The units but for parquet files whose rows stand beside them as .jsonl of the same name; and those, with that."""
    lines = {unit.path.rpartition(".")[0]: unit for unit in units if unit.format == "jsonl" and not unit.compression}
    kept, twins = [], []
    for unit in units:
        twin = lines.get(unit.path.rpartition(".")[0]) if unit.format == "parquet" else None
        if twin is not None and _same_rows(twin, unit, source):
            twins.append((unit, twin))
        else:
            kept.append(unit)
    return kept, twins


def _same_rows(lines: Unit, parquet: Unit, source: Source) -> bool:
    """Whether two files hold as many rows, and the first hundred are equal in the columns that count."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open_file(parquet.file) as file:
            num_rows = pq.read_metadata(file).num_rows
        with open_file(lines.file) as file:
            num_lines = sum(1 for line in file if line.strip())
        if num_rows != num_lines:
            return False
        first = [itertools.islice(rows_of(unit, source, hashlib.sha256()), 100) for unit in (lines, parquet)]
        return all(_values(a, source) == _values(b, source) for a, b in zip(*first, strict=True))
    except (pa.ArrowException, OSError, UnusableError):
        return False


def _values(row: Row, source: Source) -> list[Any]:
    """The values that count; of a faulty row, something that equals nothing else."""
    values = row[2]
    return [object()] if isinstance(values, Fault) else [values.get(column) for column in columns_of(source)]
