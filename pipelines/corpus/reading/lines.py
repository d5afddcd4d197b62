"""Lines, paragraphs and pieces of a text that comes in blocks; none is held beyond a bound, however long it is."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pipelines.corpus.reading.streams import char_border, text_blocks
from pipelines.corpus.reading.unit import Unit

# Two line ends or more, white space between them. The carriage return before the first is taken off afterwards: a
# pattern that begins with one character is searched 70 times as fast. Possessive, or millions of empty lines would be
# remembered one by one.
_MORE = r"[ \t]*+(?:\r?\n[ \t]*+)"
_BREAK = rf"\n{_MORE}++"
_PARAGRAPH_END, _PARAGRAPH_END_BYTES = re.compile(_BREAK), re.compile(_BREAK.encode())
_MORE_EMPTY_LINES = re.compile(f"{_MORE}*+".encode())
_BETWEEN = b" \t\r\n"

Piece = tuple[int, int, bytes]  # first byte, number within its document, content
Line = tuple[int, int, int, bytes | None]  # first byte, number from 1, number of the piece, content


def lines_of(unit: Unit, encoding: str | None, digest: Any, max_bytes: int, *, cut: bool) -> Iterator[Line]:
    """The lines that begin in a unit: each line of a file is in exactly one of its parts. Raises UnusableError."""
    if not unit.start:
        first, blocks = text_blocks(unit, encoding, digest)
    else:  # from the byte before, for the line that begins right at the start
        first, blocks = text_blocks(replace(unit, start=unit.start - 1), encoding, digest)
        first, blocks = _behind_newline(blocks, first, unit.end)
    for line in lines(blocks, first, max_bytes, cut=cut):
        if unit.end is not None and line[0] >= unit.end and line[2] == 0:
            break
        yield line


def lines(blocks: Iterator[bytes], first: int, max_bytes: int, *, cut: bool) -> Iterator[Line]:
    """Lines of a text, which only a newline ends. Of one above `max_bytes` come its pieces, or None if not `cut`."""
    offset, number, piece = first, 1, 0
    held, dropped = bytearray(), 0
    for block in blocks:
        at = 0
        while at < len(block):
            newline = block.find(b"\n", at)
            end = newline if newline >= 0 else len(block)
            if newline >= 0 and not held and not dropped and end - at <= max_bytes:  # nearly all lines
                yield offset, number, piece, block[at:end]
                offset += end - at
            else:
                held += block[at:end]
                while len(held) > max_bytes and cut:
                    border = char_border(held, max_bytes)
                    yield offset, number, piece, bytes(held[:border])
                    del held[:border]
                    offset, piece = offset + border, piece + 1
                if len(held) + dropped > max_bytes and not cut:
                    dropped += len(held)
                    held.clear()
                if newline >= 0:
                    yield offset, number, piece, None if dropped else bytes(held)
                    offset += dropped + len(held)
                    held, dropped = bytearray(), 0
            at = end + 1
            if newline >= 0:
                offset, number, piece = offset + 1, number + 1, 0
    if held or dropped:
        yield offset, number, piece, None if dropped else bytes(held)


def paragraphs(blocks: Iterator[bytes], first: int, max_bytes: int) -> Iterator[Piece]:
    """Paragraphs of a text, which empty lines part, and pieces of those above `max_bytes`."""
    held, offset, piece, searched = bytearray(), first, 0, 0
    is_between = False  # behind the empty lines that end a paragraph, of which more may follow
    for block in itertools.chain(blocks, [None]):
        held += block or b""
        taken, open_end = 0, len(held) - held.endswith(b"\r")
        if is_between and (more := _MORE_EMPTY_LINES.match(held)):
            taken = searched = more.end()
            is_between = taken >= open_end
        for end in _PARAGRAPH_END_BYTES.finditer(held, searched):
            is_between = end.end() >= open_end
            content = bytes(held[taken : end.start()].removesuffix(b"\r"))
            yield from pieces(iter([content]), offset + taken, piece, max_bytes)
            taken, piece = end.end(), 0
        if block is None:
            break
        while len(held) - taken > max_bytes + len(block):
            border = taken + char_border(held[taken : taken + max_bytes + 1], max_bytes)
            yield offset + taken, piece, bytes(held[taken:border])
            taken, piece = border, piece + 1
        del held[:taken]
        offset += taken
        searched = len(held.rstrip(_BETWEEN))
    yield from pieces(iter([bytes(held[taken:])]), offset + taken, piece, max_bytes)


def split_paragraphs(text: str) -> list[str]:
    """The paragraphs of a text that is there as a whole."""
    *parts, last = _PARAGRAPH_END.split(text)
    return [*(part.removesuffix("\r") for part in parts), last]


def pieces(blocks: Iterator[bytes], first: int, piece: int, max_bytes: int) -> Iterator[Piece]:
    """A text in pieces of at most `max_bytes`, numbered from `piece`."""
    held, offset = bytearray(), first
    for block in blocks:
        held += block
        while len(held) > max_bytes:
            border = char_border(held, max_bytes)
            yield offset, piece, bytes(held[:border])
            del held[:border]
            offset, piece = offset + border, piece + 1
    yield offset, piece, bytes(held)


def _behind_newline(blocks: Iterator[bytes], at: int, end: int | None) -> tuple[int, Iterator[bytes]]:
    for block in blocks:
        newline = block.find(b"\n")
        if newline >= 0:
            return at + newline + 1, itertools.chain([block[newline + 1 :]], blocks)
        at += len(block)
        if end is not None and at >= end:
            break
    return at, iter(())
