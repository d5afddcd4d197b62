"""The bytes of a unit as UTF-8, block by block: decompressed, decoded, and checked before the first block is given.

A compressed file and one of another encoding are read twice: once to see that the whole of it can be used, once to use
it. So memory stays at a few blocks whatever the size, and no half of a torn file becomes a document.
"""

from __future__ import annotations

import codecs
import gzip
import itertools
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

from pipelines.corpus.reading.places import first_line, open_file
from pipelines.corpus.reading.unit import Unit

BLOCK_BYTES = 1 << 20
HEAD_BYTES = 1 << 16  # what is looked at to tell text from other files
MAX_WHOLE_BYTES = 256 << 20  # of what must be held at once: a row's line, a page of HTML, a book
MAX_EXPANSION, MIN_BOMB_BYTES = 200, 16 << 20  # text compresses 3 to 20 fold
GUESSED_BYTES = 1 << 18  # enough to tell an encoding by
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),  # before UTF-16's, which they begin with
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
MAGIC = (
    b"\x89PNG", b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PK\x03\x04", b"%PDF-", b"\xff\xd8\xff", b"GIF87a", b"GIF89a",
    b"\x7fELF", b"PAR1", b"\xfd7zXZ\x00", b"7z\xbc\xaf\x27\x1c", b"SQLite format 3\x00", b"OggS\x00",
)  # fmt: skip
_CONTROL = bytes(code for code in range(0x20) if code not in b"\b\t\n\v\f\r\x1b")


class UnusableError(Exception):
    """Why a unit gives nothing, or nothing more; the message is the reason."""


def text_blocks(unit: Unit, encoding: str | None, digest: Any) -> tuple[int, Iterator[bytes]]:
    """(first byte, blocks of UTF-8 without a byte order mark). `digest` takes in the unit's bytes, decompressed.

    Of a part of a file the blocks run on behind its end, for a line that begins in it. Bytes of a text in another
    encoding are counted as UTF-8. Raises UnusableError.
    """
    if unit.end is not None:
        return _after_mark(unit.start, blocks_of(unit, digest))
    with opened(unit) as stream:
        head = stream.read(HEAD_BYTES)
    if not head:
        raise UnusableError("empty")
    codec = codec_of(head, encoding)
    if head.startswith(MAGIC) or (codec is None and is_binary(head)):
        digest.update(head)
        raise UnusableError("binary")
    if unit.compression or encoding == "auto" or codec:
        guessed = _checked(unit, codec, digest, guess=encoding == "auto")
        if guessed is not None:
            codec = guessed
            _checked(unit, codec, None)
        digest = None
    elif len(head) < HEAD_BYTES:  # all of it, as of most files
        digest.update(head)
        return _after_mark(0, iter([head]))
    blocks = blocks_of(unit, digest)
    return _after_mark(0, blocks if codec is None else _decoded(blocks, codec))


def codec_of(head: bytes, encoding: str | None) -> str | None:
    """The codec that a recipe or a byte order mark names, None for UTF-8."""
    if encoding not in (None, "auto"):
        return None if codecs.lookup(encoding).name in ("utf-8", "utf-8-sig") else encoding
    return next((codec for mark, codec in _MARKS if head.startswith(mark)), None)


def is_binary(head: bytes) -> bool:
    """Whether the beginning of a file is no UTF-8 text, by its many control characters.

    Random bytes have 10 % of them and UTF-16 half; a text that holds some NULs stays one.
    """
    share = 1 - len(head.translate(None, _CONTROL)) / max(len(head), 1)
    return share > 0.3 or (share > 0.05 and _first_bad(head) is not None)


@contextmanager
def opened(unit: Unit) -> Iterator[BinaryIO]:
    """The unit's file, decompressed. What is wrong with the compression is raised as UnusableError."""
    with open_file(unit.file) as raw:
        if unit.compression is None:
            yield raw
        elif unit.compression == "gz":
            try:
                with gzip.GzipFile(fileobj=raw) as stream:
                    yield cast(BinaryIO, stream)
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise UnusableError(f"bad_gzip: {first_line(error)}") from None
        else:
            import pyarrow as pa

            try:
                with pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd") as stream:
                    yield stream
            except OSError as error:
                if error.errno:
                    raise
                raise UnusableError(f"bad_zst: {first_line(error)}") from None


def char_border(window: bytes | bytearray, end: int) -> int:
    """The last place at or before `end` where a character begins; `end` itself where the bytes are no UTF-8."""
    for place in range(end, max(end - 4, -1), -1):
        if place == len(window) or window[place] & 0xC0 != 0x80:
            return place
    return end


def whole(blocks: Iterator[bytes]) -> bytes:
    """All blocks as one. Raises UnusableError above MAX_WHOLE_BYTES."""
    held = bytearray()
    for block in blocks:
        held += block
        if len(held) > MAX_WHOLE_BYTES:
            raise UnusableError(f"too_long: a file above {MAX_WHOLE_BYTES:,} bytes of a format that is read whole")
    return bytes(held)


def blocks_of(unit: Unit, digest: Any) -> Iterator[bytes]:
    """Blocks from the unit's start to the end of its file; `digest` takes in those up to the unit's end.

    Raises UnusableError where the file ends before the unit does.
    """
    with opened(unit) as stream:
        at = unit.start
        if at:
            stream.seek(at)
        while block := stream.read(BLOCK_BYTES):
            if digest is not None:
                digest.update(block if unit.end is None else block[: max(unit.end - at, 0)])
            at += len(block)
            yield block
        if unit.end is not None and at < unit.end:
            raise UnusableError("unreadable: the file became shorter while it was read")


def _after_mark(first: int, blocks: Iterator[bytes]) -> tuple[int, Iterator[bytes]]:
    start = next(blocks, b"")
    if first == 0 and start.startswith(codecs.BOM_UTF8):
        first, start = len(codecs.BOM_UTF8), start[len(codecs.BOM_UTF8) :]
    return first, itertools.chain([start], blocks)


def _checked(unit: Unit, codec: str | None, digest: Any, *, guess: bool = False) -> str | None:
    """What encoding a text looks like that is no UTF-8, where `guess` asks for it, else None.

    Reads all of the unit. Raises UnusableError.
    """
    total, blocks = 0, blocks_of(unit, digest)

    def counted() -> Iterator[bytes]:
        nonlocal total
        for block in blocks:
            total += len(block)
            if unit.compression and total > max(MIN_BOMB_BYTES, MAX_EXPANSION * unit.size):
                raise UnusableError(f"bomb: expands more than {MAX_EXPANSION} fold")
            yield block

    guessed = None
    if codec is not None:
        for _ in _decoded(counted(), codec):
            pass
    else:
        decoder = codecs.getincrementaldecoder("utf-8")()
        for block in itertools.chain(counted(), [b""]):
            if guess and guessed is None:
                try:
                    decoder.decode(block, final=not block)
                except UnicodeDecodeError:
                    guessed = _guessed(unit)
    return guessed


def _guessed(unit: Unit) -> str:
    """The encoding that the beginning of a file looks like."""
    import charset_normalizer

    with opened(unit) as stream:
        sample = stream.read(GUESSED_BYTES)
    if len(sample) == GUESSED_BYTES:
        sample = sample[: sample.rfind(b"\n") + 1] or sample  # which cuts no character
    best = charset_normalizer.from_bytes(sample).best()
    if best is None:
        raise UnusableError("undecodable: no UTF-8, and no other encoding fits")
    return best.encoding


def _decoded(blocks: Iterator[bytes], codec: str) -> Iterator[bytes]:
    """Blocks of another encoding as UTF-8."""
    decoder = codecs.getincrementaldecoder(codec)()
    fed, is_first = 0, True
    for block in itertools.chain(blocks, [b""]):
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeError as error:
            place = fed - pending + getattr(error, "start", 0)
            raise UnusableError(f"undecodable: byte {place} is no {codec}") from None
        fed += len(block)
        if is_first and text:
            text, is_first = text.removeprefix("\ufeff"), False
        yield text.encode(errors="surrogatepass")  # which is no UTF-8, and found where the text is decoded


def _first_bad(head: bytes) -> int | None:
    """Where the beginning of a file is no UTF-8; a character that it cuts is."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError as error:
        return error.start
    return None
