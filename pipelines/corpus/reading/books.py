"""The texts of EPUB and PDF files. Nothing is unpacked to disk, and no more of a file than a bound is held."""

from __future__ import annotations

import codecs
import io
import lzma
import posixpath
import re
import zipfile
import zlib
from html.parser import HTMLParser
from urllib.parse import unquote

from pipelines.corpus.reading.places import first_line
from pipelines.corpus.reading.streams import MAX_EXPANSION, MAX_WHOLE_BYTES, MIN_BOMB_BYTES, UnusableError, codec_of

# In XHTML these may close themselves; read as HTML they would swallow what follows.
_SELF_CLOSED = re.compile(r"<(?:script|style|title|textarea|iframe)\b[^<>]*/>", re.IGNORECASE)
_BODY, _BODY_END = re.compile(r"<body\b[^<>]*>", re.IGNORECASE), re.compile(r"</body\s*+>", re.IGNORECASE)
# What Python decodes beside these may be no encoding of text (hex), or give what is no Unicode (unicode_escape, UTF-7).
_ENCODINGS = re.compile(r"ascii|utf-8(-sig)?|utf-16(-[bl]e)?|iso8859-\d+|cp125\d")
_DECLARED = re.compile(rb"<\?xml[^>]*encoding=[\"']([\w.-]+)", re.IGNORECASE)
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, lzma.LZMAError)


def epub_html(content: bytes) -> str:
    """A book's chapters in reading order (EPUB 3.3, 4.2.6.3 and 5.7) as one page of HTML. Raises UnusableError."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as book:
            left = [min(MAX_WHOLE_BYTES, max(MIN_BOMB_BYTES, MAX_EXPANSION * len(content)))]
            package = _attribute(_read(book, "META-INF/container.xml", left), "rootfile", "full-path")
            if not package:
                raise UnusableError("bad_epub: META-INF/container.xml names no package")
            tags = _tags(_read(book, package[0], left))
            files = {a.get("id"): a.get("href") or "" for tag, a in tags if tag == "item"}
            folder = posixpath.dirname(package[0])
            chapters = []
            for chapter in (a.get("idref") for tag, a in tags if tag == "itemref"):
                if chapter not in files:
                    raise UnusableError(f"bad_epub: no file for the chapter {chapter!r}")
                path = unquote(files[chapter].partition("#")[0])
                page = _SELF_CLOSED.sub("", _read(book, posixpath.normpath(posixpath.join(folder, path)), left))
                chapters.append(f"<div>{_body(page)}</div>")
    except (*_ZIP_ERRORS, EOFError, NotImplementedError, RuntimeError, ValueError, OSError) as error:
        raise UnusableError(f"bad_epub: {first_line(error)}") from None
    return f"<html><body>{''.join(chapters)}</body></html>"


def pdf_text(content: bytes) -> str:
    """The text of a PDF's pages, empty lines between them. Raises UnusableError."""
    import pypdfium2

    pages: list[str] = []
    total = 0
    try:
        document = pypdfium2.PdfDocument(content)
        try:
            for page in document:
                text = page.get_textpage()
                pages.append(text.get_text_range().replace("\r\n", "\n").strip())
                text.close()
                page.close()
                total += len(pages[-1])
                if total > MAX_WHOLE_BYTES:
                    raise UnusableError("bomb: more text than a book can hold")
        finally:
            document.close()
    except pypdfium2.PdfiumError as error:
        raise UnusableError(f"bad_pdf: {first_line(error)}") from None
    found = "\n\n".join(page for page in pages if page)
    if not found:
        raise UnusableError("no_text: a pdf without text, perhaps of scanned pages")
    return found


def _read(book: zipfile.ZipFile, path: str, left: list[int]) -> str:
    """A file of a book, decoded; `left` holds how many bytes all of them may still have."""
    try:
        with book.open(path) as file:
            content = file.read(left[0] + 1)
    except KeyError:
        raise UnusableError(f"bad_epub: there is no {path!r} in it") from None
    left[0] -= len(content)
    if left[0] < 0:
        raise UnusableError(f"bomb: expands more than {MAX_EXPANSION} fold")
    declared = _DECLARED.match(content[:200])
    name = codec_of(content, None) or (declared.group(1).decode() if declared else "utf-8")
    try:
        if not _ENCODINGS.fullmatch(codecs.lookup(name).name):
            raise LookupError(f"no encoding {name!r} in a book")
        return content.decode(name).removeprefix("\ufeff")
    except (UnicodeError, LookupError) as error:
        raise UnusableError(f"undecodable: {path!r}: {first_line(error)}") from None


def _body(page: str) -> str:
    """What stands between a page's first <body> and its last </body>; all of it where they are not both there."""
    start = _BODY.search(page)
    ends = list(_BODY_END.finditer(page, start.end())) if start else []
    return page[start.end() : ends[-1].start()] if start and ends else page


def _tags(text: str) -> list[tuple[str, dict[str, str | None]]]:
    """The tags of an XML file without their prefixes. No entity is expanded, so that none can explode."""
    found: list[tuple[str, dict[str, str | None]]] = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            found.append((tag.rpartition(":")[2], dict(attrs)))

    try:
        Tags().feed(text)
    except AssertionError as error:  # which it raises at a marked section that it does not know
        raise UnusableError(f"bad_epub: {first_line(error)}") from None
    return found


def _attribute(text: str, tag: str, attribute: str) -> list[str]:
    return [value for name, attributes in _tags(text) if name == tag and (value := attributes.get(attribute))]
