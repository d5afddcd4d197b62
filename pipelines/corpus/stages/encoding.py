"""Mojibake repaired: UTF-8 that somebody decoded as Latin-1 or another one-byte encoding, once or more (ftfy).

Nothing else of ftfy's is used: quotes, ligatures and widths stay as they are. Each line is judged by itself, as in
ftfy: one file may hold lines of several pasts, and the time is linear in the length.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import ftfy

from pipelines.corpus.stages import Verdict

# All that ftfy's own test of a line can match holds two characters beyond ASCII in a row, or one of these few. Few
# lines do, and this test is forty times as fast. Wrong only with another ftfy: the tests compare the two.
_SUSPECT = re.compile(r"[^\x00-\x7f](?:[^\x00-\x7f]|(?<=[\x80-\x9fÂÃŒœ]))")


def repair(texts: Sequence[str]) -> list[Verdict]:
    """The texts with their mojibake repaired; none is dropped."""
    return [(text if text.isascii() or not _SUSPECT.search(text) else _repair(text), None) for text in texts]


def _repair(text: str) -> str:
    return "\n".join(ftfy.fix_encoding(line) if _SUSPECT.search(line) else line for line in text.split("\n"))
