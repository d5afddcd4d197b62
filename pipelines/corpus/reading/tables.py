"""Rows of jsonl, csv, tsv and parquet files, each with its place, or with what is wrong in its stead."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from pipelines.corpus.reading.lines import lines_of
from pipelines.corpus.reading.places import first_line, open_file
from pipelines.corpus.reading.streams import MAX_WHOLE_BYTES, UnusableError
from pipelines.corpus.reading.unit import Unit
from ulm.recipes.corpus import Source

BATCH_BYTES = 4 << 20  # of parquet rows that are held at once
# What values that Python has no like of raise: times out of range, unknown time zones, bytes that are no UTF-8.
VALUE_ERRORS = (ValueError, OverflowError, KeyError)
_TOO_LONG = f"too_long: a line above {MAX_WHOLE_BYTES:,} bytes"
_ARRAY_REMEDY = "a JSON array must become one object a line, as by jq -c '.[]'"


class Fault(str):
    """A reason where a row should be."""

    __slots__ = ()


Row = tuple[int, int, dict[str, Any] | Fault]  # byte or row number, line from 1 or 0, values by column


def rows_of(unit: Unit, source: Source, digest: Any) -> Iterator[Row]:
    """All rows of a unit. Raises UnusableError where the file gives nothing more."""
    if unit.format == "dataset":
        from pipelines.corpus.reading.hub import dataset_rows

        return hashed(dataset_rows(unit, source), digest)
    if unit.format == "parquet":
        return hashed(parquet_rows(unit, source), digest)
    read = {"jsonl": _json_rows, "tsv": _tsv_rows, "csv": _csv_rows}[unit.format]
    return read(unit, source, digest)


def columns_of(source: Source) -> list[str]:
    """The columns that a source is made of."""
    if source.source is not None and source.target is not None:
        return [source.source, source.target]
    return [source.messages or source.text]


def is_array(head: bytes) -> bool:
    """Whether a file that should have a JSON object a line begins with an array over several lines."""
    line = head.lstrip().partition(b"\n")[0].rstrip()
    return line.startswith(b"[") and not line.endswith(b"]")


def hashed(rows: Iterable[Row], digest: Any) -> Iterator[Row]:
    """The rows, their values counted into the content digest."""
    for offset, line, row in rows:
        for value in row.values() if isinstance(row, dict) else (row,):
            content = (value if isinstance(value, str) else repr(value)).encode(errors="backslashreplace")
            digest.update(len(content).to_bytes(8, "little") + content)
        yield offset, line, row


def _missing(source: Source, columns: list[str]) -> Fault | None:
    for column in columns_of(source):
        if column not in columns:
            return Fault(f"no_text: no column {column!r} among {', '.join(columns[:10])}")
    return None


def _unfit(source: Source, schema: Any) -> Fault | None:
    """Why the columns of a parquet file are none to be read."""
    import pyarrow as pa

    if missing := _missing(source, schema.names):
        return missing
    for column in columns_of(source):
        if schema.names.count(column) > 1:
            return Fault(f"bad_parquet: several columns {column!r}")
        kind = schema.field(column).type
        if isinstance(kind, pa.BaseExtensionType):
            kind = kind.storage_type
        if isinstance(kind, pa.DictionaryType):
            kind = kind.value_type
        if source.messages is None and kind not in (pa.string(), pa.large_string(), pa.string_view()):
            return Fault(f"text_not_string: {re.split('[^a-z0-9_]', str(kind))[0]}")
    return None


def _json_rows(unit: Unit, source: Source, digest: Any) -> Iterator[Row]:
    for offset, line, _, content in lines_of(unit, source.encoding, digest, MAX_WHOLE_BYTES, cut=False):
        if content is None:
            yield offset, line, Fault(_TOO_LONG)
        elif not content.strip():
            yield offset, line, Fault("empty")
        elif line == 1 and unit.start == 0 and is_array(content):
            raise UnusableError(f"bad_json: {_ARRAY_REMEDY}")
        else:
            yield offset, line, _json_row(content, offset)


def _json_row(content: bytes, offset: int) -> dict[str, Any] | Fault:
    try:
        value = json.loads(content.decode())
    except UnicodeDecodeError as error:
        return undecodable(offset + error.start)
    except RecursionError:
        return Fault("bad_json: nested too deep")
    except ValueError as error:
        return Fault(f"bad_json: {error}")
    if isinstance(value, dict):
        return value
    remedy = f" ({_ARRAY_REMEDY})" if isinstance(value, list) else ""
    return Fault(f"bad_json: a {type(value).__name__} where an object should be{remedy}")


def undecodable(byte: int | str) -> Fault:
    """What is said of a byte that is no UTF-8, by its place or its value."""
    return Fault(f"undecodable: byte {byte} is no UTF-8 (another encoding? say encoding: auto)")


def _tsv_rows(unit: Unit, source: Source, digest: Any) -> Iterator[Row]:
    """Rows of tab-separated values, which know no quotes."""
    names = source.columns
    if names is None and unit.start:
        top = lines_of(replace(unit, start=0, end=None), source.encoding, hashlib.sha256(), MAX_WHOLE_BYTES, cut=False)
        names = _fields(next(top)[3])
    for offset, line, _, content in lines_of(unit, source.encoding, digest, MAX_WHOLE_BYTES, cut=False):
        if names is None or (line == 1 and unit.start == 0):
            names = names or _fields(content)
            if missing := _missing(source, names):
                raise UnusableError(missing)
            if source.columns is None:
                continue
        if content is None:
            yield offset, line, Fault(_TOO_LONG)
        elif not content.strip():
            yield offset, line, Fault("empty")
        else:
            yield offset, line, _named(names, _fields(content), "bad_tsv")


def _fields(content: bytes | None) -> list[str]:
    if content is None:
        raise UnusableError(_TOO_LONG)
    return content.decode(errors="surrogateescape").removesuffix("\r").split("\t")


def _named(names: list[str], fields: list[str], reason: str) -> dict[str, Any] | Fault:
    if len(fields) != len(names):
        return Fault(f"{reason}: a row of {len(fields)} for {len(names)} columns")
    return dict(zip(names, fields, strict=True))


def _csv_rows(unit: Unit, source: Source, digest: Any) -> Iterator[Row]:
    """Rows of comma-separated values, by number; the line is the one that a row ends in."""

    def text_lines() -> Iterator[str]:
        for _, _, _, content in lines_of(unit, source.encoding, digest, MAX_WHOLE_BYTES, cut=False):
            if content is None:
                raise UnusableError(_TOO_LONG)
            yield content.decode(errors="surrogateescape") + "\n"

    csv.field_size_limit(MAX_WHOLE_BYTES)
    reader = csv.reader(text_lines(), strict=True)
    names = source.columns
    number = 0
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, reader.line_num, Fault(f"bad_csv: {error}")
            number += 1
            continue
        if names is None:
            names = fields
            if missing := _missing(source, names):
                raise UnusableError(missing)
        elif fields:
            yield number, reader.line_num, _named(names, fields, "bad_csv")
            number += 1


def parquet_rows(unit: Unit, source: Source) -> Iterator[Row]:
    """Rows of a parquet file's row groups, a few at a time. Raises UnusableError.

    Columns stay dictionaries, and each value is taken out by itself: rows that share a long one, which a small file
    can have by the thousand, are never held together.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = columns_of(source)
    row = unit.row
    try:
        with open_file(unit.file) as opened:
            metadata = pq.read_metadata(opened)
            leaves = [metadata.schema.column(leaf) for leaf in range(metadata.num_columns)]
            dictionaries = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
            file = pq.ParquetFile(
                opened, metadata=metadata, read_dictionary=dictionaries, pre_buffer=False, buffer_size=1 << 20
            )
            if fault := _unfit(source, file.schema_arrow):
                if unit.start == 0:
                    raise UnusableError(fault)
                return
            groups = range(unit.start, metadata.num_row_groups if unit.end is None else unit.end)
            row_bytes = unit.size // max(sum(metadata.row_group(group).num_rows for group in groups), 1)
            batch_rows = min(max(BATCH_BYTES // max(row_bytes, 1), 1), 1_000)
            for batch in file.iter_batches(batch_rows, row_groups=list(groups), columns=columns):
                batch.validate(full=True)
                for values in zip(*(batch.column(column) for column in columns), strict=True):
                    yield row, 0, {column: value.as_py() for column, value in zip(columns, values, strict=True)}
                    row += 1
    except (*VALUE_ERRORS, pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise UnusableError(f"bad_parquet: {first_line(error)}") from None
