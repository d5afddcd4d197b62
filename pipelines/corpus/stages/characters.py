"""Characters as a model should see them: one form of line end, no control characters, NFC, within the length bound.

What is text stays: zero-width characters, joiners, bidirectional marks, soft hyphens, a byte order mark inside a
document (at the beginning of a file it is the reader's), private use, white space of any kind, and U+2028 and U+2029.
NFC sorts the marks on a letter, in time that grows with their number squared; so it comes with a joiner after every 30
of them, as in UAX #15, Stream-Safe Text Format. No language has so many.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from pipelines.corpus.stages import Verdict
from ulm.recipes.corpus import Clean

# Unicode's Cc but tab and newline. Line ends are made uniform before.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_CONTROL_ASCII = bytes(code for code in range(0x80) if _CONTROL.match(chr(code)))

MAX_MARKS = 30  # in a row
JOINER = "\u034f"  # combining grapheme joiner: shows nothing, and marks are not sorted across it
# Marks are neither below U+0300 nor letters; the first of the class stands alone because `re` skips to it quickly then.
_MAYBE_MARKS = re.compile(rf"[^\x00-\u02ff\w][^\x00-\u02ff\w]{{{MAX_MARKS},}}+")


def unify(texts: Sequence[str], config: Clean) -> list[Verdict]:
    """The texts in one form; `empty` where only white space is left, `too_short` below min_document_bytes of UTF-8."""
    return [_unify(text, config) for text in texts]


def _unify(text: str, config: Clean) -> Verdict:
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    ascii_only = text.isascii()
    if config.control:
        if ascii_only:  # most text; bytes.translate is ten times as fast
            text = text.encode().translate(None, _CONTROL_ASCII).decode()
        else:
            text = _CONTROL.sub("", text)
    if config.nfc and not ascii_only:
        # twice: in NFC a few marks become two
        text = _part_marks(unicodedata.normalize("NFC", _part_marks(text)))
    if not text or text.isspace():
        return text, "empty"
    num_bytes = len(text) if ascii_only else len(text.encode())
    return text, "too_short" if num_bytes < config.min_document_bytes else None


def _part_marks(text: str) -> str:
    """The text with a joiner after every MAX_MARKS marks in a row that are followed by another."""
    return _MAYBE_MARKS.sub(_parted, text)


def _parted(run: re.Match[str]) -> str:
    parts = []
    num_marks = 0
    for character in run[0]:
        num_marks = num_marks + 1 if unicodedata.combining(character) else 0
        if num_marks > MAX_MARKS:
            parts.append(JOINER)
            num_marks = 1
        parts.append(character)
    return "".join(parts)
