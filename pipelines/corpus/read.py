"""Records of a unit of work: texts with their place, and everything that could not be read, with its reason."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pipelines.corpus.sources import CHUNK_BYTES, Unit

_PARAGRAPH_END = re.compile(rb"(?:\r?\n[ \t]*){2,}")
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Record:
    """One document as read, or what stands in its place: `text` is None where `reason` says why."""

    offset: int  # byte in a text or jsonl file, row of parquet and datasets
    text: str | None
    reason: str | None = None
    line: int = 0  # of a line format, counted from 1 within the unit; 0 elsewhere


@dataclass
class Reading:
    """Filled while a unit is read: its content digest and how many lines it has."""

    hash: Any = field(default_factory=hashlib.sha256)
    num_lines: int = 0


def read_unit(unit: Unit, reading: Reading) -> Iterator[Record]:
    """All records of a unit in order. Faults become records with a reason, never exceptions."""
    if unit.format == "dataset":
        from pipelines.corpus.hub import dataset_rows

        yield from _split_rows(unit, _hashed(dataset_rows(unit), reading))
    elif unit.format == "parquet":
        yield from _split_rows(unit, _hashed(_parquet_rows(unit), reading))
    else:
        try:
            start, raw = _read_bytes(unit)
        except OSError as error:
            yield Record(0, None, f"unreadable: {error.strerror}")
            return
        reading.hash.update(raw)
        if unit.start == 0 and unit.end is None and (b"\0" in raw or not raw):
            yield Record(0, None, "binary" if raw else "empty")
        elif unit.format == "jsonl":
            yield from _split_rows(unit, _json_lines(raw, start, reading))
        else:
            yield from _text_records(unit, raw, start, reading)


def _read_bytes(unit: Unit) -> tuple[int, bytes]:
    """Content and its place; of a part, the lines that begin in it, so that each line is in exactly one part."""
    with open(unit.file, "rb") as file:
        if unit.end is None:
            raw = file.read()
            return (len(_BOM), raw[len(_BOM) :]) if raw.startswith(_BOM) else (0, raw)
        start = 0
        if unit.start:
            file.seek(unit.start - 1)
            start = unit.start - 1 + len(file.readline())
        if start >= unit.end:
            return start, b""
        file.seek(start)
        raw = file.read(unit.end - start)
        if not raw.endswith(b"\n"):
            raw += file.readline()
        return (len(_BOM), raw[len(_BOM) :]) if start == 0 and raw.startswith(_BOM) else (start, raw)


def _lines(raw: bytes, start: int, reading: Reading) -> Iterator[tuple[int, int, bytes]]:
    """(byte, line number, content) of lines; only newline ends one."""
    place, at = 0, 0
    while at < len(raw):
        end = raw.find(b"\n", at)
        end = len(raw) if end < 0 else end
        place += 1
        yield start + at, place, raw[at:end]
        at = end + 1
    reading.num_lines = place


def _text_records(unit: Unit, raw: bytes, start: int, reading: Reading) -> Iterator[Record]:
    if unit.document == "line":
        for offset, line, content in _lines(raw, start, reading):
            if content.strip():
                yield _decoded(offset, content, line)
        return
    whole = _decoded(start, raw)
    if unit.document == "file" or whole.reason:
        yield whole
        return
    at = 0
    for end in itertools.chain(_PARAGRAPH_END.finditer(raw), [None]):
        content = raw[at : end.start() if end else len(raw)]
        if content.strip():
            yield _decoded(start + at, content)
        at = end.end() if end else at


def _decoded(offset: int, content: bytes, line: int = 0) -> Record:
    try:
        return Record(offset, content.decode(), line=line)
    except UnicodeDecodeError as error:
        return Record(offset, None, f"undecodable: byte {error.start} is no UTF-8", line)


def _json_lines(raw: bytes, start: int, reading: Reading) -> Iterator[tuple[int, int, Any]]:
    """(byte, line, value) where the value is a row, or a string of the kind `Fault` for a line that is none."""
    for offset, line, content in _lines(raw, start, reading):
        if not content.strip():
            yield offset, line, Fault("empty")
            continue
        try:
            value = json.loads(content.decode())
        except UnicodeDecodeError as error:
            value = Fault(f"undecodable: byte {error.start} is no UTF-8")
        except (ValueError, RecursionError) as error:
            message = "nested too deep" if isinstance(error, RecursionError) else str(error)
            value = Fault(f"bad_json: {message}")
        else:
            if not isinstance(value, dict):
                value = Fault(f"bad_json: a {type(value).__name__} where an object should be")
        yield offset, line, value


class Fault(str):
    """A reason where a row should be."""

    __slots__ = ()


def _hashed(rows: Iterator[tuple[int, int, Any]], reading: Reading) -> Iterator[tuple[int, int, Any]]:
    """The rows, their texts counted into the content digest."""
    for offset, line, row in rows:
        text = next(iter(row.values())) if isinstance(row, dict) else row
        content = repr(text).encode(errors="backslashreplace")
        reading.hash.update(len(content).to_bytes(8, "little") + content)
        yield offset, line, row


def _split_rows(unit: Unit, rows: Iterator[tuple[int, int, Any]]) -> Iterator[Record]:
    """Records of rows: the text of each, or its lines or paragraphs."""
    for offset, line, row in rows:
        if isinstance(row, Fault):
            yield Record(offset, None, str(row), line)
            continue
        text = row.get(unit.text)
        if unit.text not in row:
            yield Record(
                offset, None, f"no_text: no {unit.text!r} among {', '.join(list(row)[:10]) or 'no keys'}", line
            )
        elif not isinstance(text, str):
            yield Record(offset, None, f"text_not_string: {type(text).__name__}", line)
        elif _has_surrogate(text):
            yield Record(offset, None, "undecodable: a lone surrogate", line)
        elif unit.document == "record":
            yield Record(offset, text, line=line)
        else:
            pieces = text.split("\n") if unit.document == "line" else re.split(r"(?:\r?\n[ \t]*){2,}", text)
            yield from (Record(offset, piece, line=line) for piece in pieces if piece.strip())


def _has_surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def row_groups(unit: Unit) -> list[tuple[int, int | None, int, int]]:
    """Where to part a parquet file: (first group, end, first row, bytes) of runs of about CHUNK_BYTES."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(unit.file)
    except (pa.ArrowException, OSError):
        return [(0, None, 0, unit.size)]  # the reader says what is wrong with it
    parts: list[tuple[int, int | None, int, int]] = []
    start = first_row = row = size = 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        if size and size + group.total_byte_size > CHUNK_BYTES:
            parts.append((start, number, first_row, size))
            start, first_row, size = number, row, 0
        size += group.total_byte_size
        row += group.num_rows
    parts.append((start, metadata.num_row_groups, first_row, size))
    return parts


def _parquet_rows(unit: Unit) -> Iterator[tuple[int, int, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if unit.size == 0 and unit.end is None:
            raise OSError("the file is empty")
        with pq.ParquetFile(unit.file) as file:
            columns = file.schema_arrow.names
            if unit.text not in columns:
                known = ", ".join(columns[:10])
                yield 0, 0, Fault(f"no_text: no column {unit.text!r} among {known}")
                return
            groups = range(unit.start, file.num_row_groups if unit.end is None else unit.end)
            column = file.read_row_groups(list(groups), columns=[unit.text]).column(0)
            column.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        yield 0, 0, Fault(f"bad_parquet: {error}".split("\n")[0][:300])
        return
    row = unit.row
    for chunk in column.chunks:
        for value in chunk:
            yield row, 0, {unit.text: value.as_py()}
            row += 1


def same_rows(lines: Unit, parquet: Unit) -> bool:
    """Whether a .jsonl and a .parquet file hold the same texts: as many rows, and the first hundred equal."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        num_rows = pq.read_metadata(parquet.file).num_rows
        with open(lines.file, "rb") as file:
            num_lines = sum(1 for line in file if line.strip())
    except (pa.ArrowException, OSError):
        return False
    if num_rows != num_lines:
        return False
    pairs = itertools.zip_longest(
        itertools.islice(_split_rows(parquet, _parquet_rows(parquet)), 100), itertools.islice(_first_lines(lines), 100)
    )
    return all(a is not None and b is not None and a.text is not None and a.text == b.text for a, b in pairs)


def _first_lines(lines: Unit) -> Iterator[Record]:
    with open(lines.file, "rb") as file:
        raw = b"".join(itertools.islice((line for line in file if line.strip()), 100))
    return _split_rows(lines, _json_lines(raw.removeprefix(_BOM), 0, Reading()))
