"""Text as a model should see it: one form of line end, no control characters, NFC, within the length bounds."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator

from ulm.recipes.corpus import Clean

# Unicode's Cc but tab and newline. Line ends are made uniform before.
_CONTROL = {code: None for code in [*range(0x20), *range(0x7F, 0xA0)] if code not in (0x09, 0x0A)}
_CONTROL_ASCII = bytes(code for code in _CONTROL if code < 0x80)


def clean_text(text: str, config: Clean) -> tuple[str, str | None]:
    """The cleaned text, and the reason to drop it or None."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if config.control:
        if text.isascii():  # most text; bytes.translate is ten times str.translate
            text = text.encode().translate(None, _CONTROL_ASCII).decode()
        else:
            text = text.translate(_CONTROL)
    if config.nfc:
        text = unicodedata.normalize("NFC", text)
    if not text.strip():
        return text, "empty"
    if len(text.encode()) < config.min_document_bytes:
        return text, "too_short"
    return text, None


def cut(text: str, max_bytes: int) -> Iterator[str]:
    """The text in pieces of at most `max_bytes` of UTF-8 (at least one character each); joined they give it back."""
    encoded = text.encode()
    start = 0
    while len(encoded) - start > max_bytes:
        end = start + max_bytes
        while end > start and encoded[end] & 0xC0 == 0x80:  # inside a character
            end -= 1
        if end == start:  # one character is longer than the bound
            end = start + 1
            while end < len(encoded) and encoded[end] & 0xC0 == 0x80:
                end += 1
        yield encoded[start:end].decode()
        start = end
    if start < len(encoded):
        yield encoded[start:].decode()
