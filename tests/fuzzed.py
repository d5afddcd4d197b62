"""Strings from all over Unicode, always the same ones."""

from __future__ import annotations

import random

NUM_TEXTS, MAX_CHARS = 200, 40
LAST = (0x20, 0x7F, 0x2FF, 0x3000, 0xFFFF, 0x1F680, 0x10FFFF)  # code points that a text's are drawn below


def fuzzed() -> list[str]:
    """Texts without surrogates: control characters, scripts, signs, what has no meaning."""
    draw = random.Random(0)
    texts = []
    for _ in range(NUM_TEXTS):
        last = draw.choice(LAST)
        points = (draw.randrange(last) for _ in range(draw.randrange(1, MAX_CHARS)))
        texts.append("".join(chr(point) for point in points if not 0xD800 <= point < 0xE000))
    return texts
