"""C4's rules: lines that do not look like prose go, and documents with too little left (arXiv 1910.10683, 2.2).

Where the paper leaves a choice it is that of C4's code, which datatrove follows too: an ellipsis does not end a line,
and a line with a word of more than 1,000 characters goes. As in the paper, a phrase that drops a document may stand
in any of its lines (C4's code looks only at those that it keeps). The paper's list of bad words is not applied.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from pipelines.corpus.stages import Verdict
from ulm.recipes.corpus import C4Quality

TERMINAL_MARKS = (".", "?", "!", '"', "'", "”", "’")  # full stop, question, exclamation, closing quotation mark
ELLIPSIS = "..."
POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
CITATION = re.compile(r"\[(?:\d*|edit|citation needed)\]")
SENTENCE_END = re.compile(r"""[.?!]["'”’)\]]*(?=\s)""")  # the last sentence of a line has no space after it


def c4_quality(texts: Sequence[str], config: C4Quality) -> list[Verdict]:
    """Each text without the lines that C4 takes out, each one stripped, or the reason to drop it as it is."""
    return [_edit(text, config) for text in texts]


def _edit(text: str, config: C4Quality) -> Verdict:
    if config.curly_bracket and "{" in text:
        return text, "c4_quality: curly_bracket"
    lower = text.lower()
    if config.lorem_ipsum and "lorem ipsum" in lower:
        return text, "c4_quality: lorem_ipsum"
    banned = [phrase for phrase in ("javascript",) * config.javascript + POLICIES * config.policy if phrase in lower]
    edited = CITATION.sub("", text) if config.citations and "[" in text else text
    lines = [line for given in edited.split("\n") if _is_prose(line := given.strip(), banned, config)]
    if not _has_sentences(lines, config.min_sentences):
        return text, "c4_quality: too_few_sentences"
    if not lines:
        return text, "c4_quality: no_line_left"
    return "\n".join(lines), None


def _is_prose(line: str, banned: Sequence[str], config: C4Quality) -> bool:
    if config.terminal_punctuation and (not line.endswith(TERMINAL_MARKS) or line.endswith(ELLIPSIS)):
        return False
    if len(line.split(None, config.min_line_words)) < config.min_line_words or not line:
        return False
    if len(line) > config.max_word_chars and max(map(len, line.split())) > config.max_word_chars:
        return False
    return not banned or not any(phrase in line.lower() for phrase in banned)


def _has_sentences(lines: Sequence[str], min_sentences: int) -> bool:
    """Whether the lines hold so many sentences; each line is one or more."""
    missing = min_sentences - len(lines)
    for line in lines:
        if missing <= 0:
            break
        missing -= len(SENTENCE_END.findall(line))
    return missing <= 0
