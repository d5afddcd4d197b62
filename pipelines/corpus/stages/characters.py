"""Characters as a model should see them: one form of line end, no control characters, NFC, within the length bound.

What is text stays: zero-width characters, joiners, bidirectional marks, soft hyphens, a byte order mark inside a
document (at the beginning of a file it is the reader's), private use, white space of any kind, and U+2028 and U+2029.
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
        text = unicodedata.normalize("NFC", text)
    if not text or text.isspace():
        return text, "empty"
    num_bytes = len(text) if ascii_only else len(text.encode())
    return text, "too_short" if num_bytes < config.min_document_bytes else None
