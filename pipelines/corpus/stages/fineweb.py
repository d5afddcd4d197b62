"""FineWeb's own rules (arXiv 2406.17557, 3.6): lists, menus and repeated lines, by the look of the lines.

The paper's three, and the share of newlines that its code (datatrove) has too. Lines are those that hold more than
white space.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.corpus.stages import Verdict
from pipelines.corpus.stages.c4 import TERMINAL_MARKS
from pipelines.corpus.stages.gopher import full_lines, repeats
from ulm.recipes.corpus import FineWebQuality


def fineweb_quality(texts: Sequence[str], config: FineWebQuality) -> list[Verdict]:
    """Each text, and the first of FineWeb's rules that it breaks."""
    return [(text, reason and f"fineweb_quality: {reason}") for text in texts for reason in [_flaw(text, config)]]


def _flaw(text: str, config: FineWebQuality) -> str | None:
    lines = full_lines(text)
    if sum(line.rstrip().endswith(TERMINAL_MARKS) for line in lines) < config.min_punctuated_lines * len(lines):
        return "too_few_punctuated_lines"
    if sum(len(line) < config.short_line_chars for line in lines) > config.max_short_lines * len(lines):
        return "too_many_short_lines"
    newlines = text.count("\n")
    if repeats(lines)[1] > config.max_duplicate_line_chars * (len(text) - newlines):
        return "duplicate_line_chars"
    if newlines > config.max_newline_word_ratio * len(text.split()):
        return "too_many_newlines"
    return None
