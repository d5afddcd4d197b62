"""Records of a unit of work: texts with their place, and everything that could not be read, with its reason."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from pipelines.corpus.reading.chats import transcript
from pipelines.corpus.reading.formats import BOOKS, ROWS
from pipelines.corpus.reading.lines import lines_of, paragraphs, pieces, split_paragraphs
from pipelines.corpus.reading.places import brief, first_line
from pipelines.corpus.reading.streams import UnusableError, blocks_of, char_border, text_blocks, whole
from pipelines.corpus.reading.tables import Fault, rows_of, undecodable
from pipelines.corpus.reading.unit import Unit, document_rule, is_html
from ulm.recipes.corpus import Source


@dataclass(frozen=True)
class Record:
    """One document or a piece of one as read, or what stands in its place: `text` is None where `reason` says why.

    All pieces of a cut row have the offset of the row; of a cut text, each has its own.
    """

    offset: int  # byte of a text, jsonl or tsv file (decompressed, as UTF-8); row of csv, parquet and datasets
    text: str | None
    reason: str | None = None
    line: int = 0  # of a file of lines, counted from 1 within the unit; 0 elsewhere
    target: str | None = None  # of a pair, whose source text is `text`
    is_chat: bool = False  # a transcript, with marks (chats.py)
    piece: int = 0  # number within its document, which was cut where any is above 0


@dataclass
class Reading:
    """Filled while a unit is read: its content digest and how many lines it has."""

    hash: Any = field(default_factory=hashlib.sha256)
    num_lines: int = 0


def read_unit(unit: Unit, source: Source, reading: Reading, max_bytes: int, chat_template: str) -> Iterator[Record]:
    """All records of a unit in order. Faults become records with a reason, never exceptions.

    A text above `max_bytes` is cut into consecutive records, a pair or a chat is dropped; HTML is given whole, for it
    is cut when it has become text (`cut`).
    """
    for record in _records(unit, source, reading, max_bytes, chat_template):
        yield record if record.reason is None else replace(record, reason=brief(record.reason))


def _records(unit: Unit, source: Source, reading: Reading, max_bytes: int, chat_template: str) -> Iterator[Record]:
    start = unit.row if unit.format in ("parquet", "dataset") else unit.start
    try:
        if unit.format in ROWS:
            yield from _of_rows(unit, source, reading, max_bytes, chat_template)
        elif unit.format in BOOKS or is_html(unit, source):
            yield from _of_whole(unit, source, reading, max_bytes)
        else:
            yield from _of_text(unit, source, reading, max_bytes)
    except UnusableError as fault:
        yield Record(start, None, str(fault))
    except OSError as error:
        yield Record(start, None, f"unreadable: {first_line(error)}")


def cut(text: str, max_bytes: int) -> Iterator[str]:
    """The text in pieces of at most `max_bytes` of UTF-8 (at least one character each); joined they give it back."""
    if len(text) * 4 <= max_bytes:
        if text:
            yield text
        return
    encoded = text.encode()
    start = 0
    while len(encoded) - start > max_bytes:
        window = encoded[start : start + max_bytes + 1]
        length = char_border(window, max_bytes)
        if length == 0:  # one character is longer than the bound
            length = len(encoded[start : start + 4].decode(errors="ignore")[0].encode())
        yield encoded[start : start + length].decode()
        start += length
    if start < len(encoded):
        yield encoded[start:].decode()


def _of_text(unit: Unit, source: Source, reading: Reading, max_bytes: int) -> Iterator[Record]:
    rule = document_rule(unit.format, source)
    if rule == "line":
        for offset, line, piece, content in lines_of(unit, source.encoding, reading.hash, max_bytes, cut=True):
            reading.num_lines = line
            if content and not content.isspace():
                yield _decoded(offset, content, line=line, piece=piece)
        return
    first, blocks = text_blocks(unit, source.encoding, reading.hash)
    if rule == "paragraph":
        for offset, piece, content in paragraphs(blocks, first, max_bytes):
            if content and not content.isspace():
                yield _decoded(offset, content, piece=piece)
    else:
        if unit.end is not None:
            blocks = _until(blocks, first, unit.end)
        for offset, piece, content in pieces(blocks, first, unit.piece, max_bytes):
            yield _decoded(offset, content, piece=piece)


def _of_whole(unit: Unit, source: Source, reading: Reading, max_bytes: int) -> Iterator[Record]:
    """The one document of a page of HTML or a book."""
    if unit.format in BOOKS:
        from pipelines.corpus.reading.books import epub_html, pdf_text

        content = whole(blocks_of(unit, reading.hash))
        if not content:
            raise UnusableError("empty")
        if unit.format == "epub":
            yield Record(0, epub_html(content))
        else:
            yield from _pieces_of(Record(0, pdf_text(content)), max_bytes)
    else:
        first, blocks = text_blocks(unit, source.encoding, reading.hash)
        yield _decoded(first, whole(blocks))


def _of_rows(unit: Unit, source: Source, reading: Reading, max_bytes: int, chat_template: str) -> Iterator[Record]:
    rule = document_rule(unit.format, source)
    for offset, line, row in rows_of(unit, source, reading.hash):
        reading.num_lines = max(reading.num_lines, line)
        if isinstance(row, Fault):
            yield Record(offset, None, str(row), line)
        elif source.messages is not None:
            yield _of_chat(offset, line, row, source.messages, max_bytes, chat_template)
        elif source.source is not None and source.target is not None:
            text, target = _text(row, source.source), _text(row, source.target)
            fault = next((value for value in (text, target) if isinstance(value, Fault)), None)
            if fault is None and len(text.encode()) + len(target.encode()) > max_bytes:
                fault = Fault("too_long: a pair is not cut")
            yield Record(offset, None, fault, line) if fault else Record(offset, text, line=line, target=target)
        else:
            text = _text(row, source.text)
            if isinstance(text, Fault):
                yield Record(offset, None, str(text), line)
            elif rule == "record":
                record = Record(offset, text, line=line)
                yield from [record] if source.html else _pieces_of(record, max_bytes)
            else:
                for part in text.split("\n") if rule == "line" else split_paragraphs(text):
                    if part.strip():
                        yield from _pieces_of(Record(offset, part, line=line), max_bytes)


def _of_chat(offset: int, line: int, row: dict[str, Any], column: str, max_bytes: int, template: str) -> Record:
    if column not in row:
        return Record(offset, None, _no_column(row, column), line)
    text = transcript(row[column], template)
    if not isinstance(text, Fault):
        text = _text({column: text}, column)
    if not isinstance(text, Fault) and len(text.encode()) > max_bytes:
        text = Fault("too_long: a chat is not cut")
    return (
        Record(offset, None, str(text), line)
        if isinstance(text, Fault)
        else Record(offset, text, line=line, is_chat=True)
    )


def _text(row: dict[str, Any], column: str) -> str:
    """The text in a column, or a Fault."""
    if column not in row:
        return _no_column(row, column)
    text = row[column]
    if not isinstance(text, str):
        return Fault(f"text_not_string: {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        place = ord(text[error.start])
        if 0xDC80 <= place <= 0xDCFF:  # what the readers of csv and tsv make of such a byte
            return undecodable(f"{place - 0xDC00:#x}")
        return Fault("undecodable: a lone surrogate")
    return text


def _no_column(row: dict[str, Any], column: str) -> Fault:
    return Fault(f"no_text: no {column!r} among {', '.join(list(row)[:10]) or 'no keys'}")


def _pieces_of(record: Record, max_bytes: int) -> Iterator[Record]:
    assert record.text is not None
    if len(record.text) * 4 <= max_bytes:
        yield record
    else:
        yield from (replace(record, text=text, piece=piece) for piece, text in enumerate(cut(record.text, max_bytes)))


def _decoded(offset: int, content: bytes, *, line: int = 0, piece: int = 0) -> Record:
    try:
        return Record(offset, content.decode(), line=line, piece=piece)
    except UnicodeDecodeError as error:
        return Record(offset, None, str(undecodable(offset + error.start)), line, piece=piece)


def _until(blocks: Iterator[bytes], at: int, end: int) -> Iterator[bytes]:
    """The blocks of a part of a file, up to its end."""
    for block in blocks:
        yield block[: end - at]
        at += len(block)
        if at >= end:
            return
