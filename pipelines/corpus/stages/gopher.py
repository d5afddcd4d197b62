"""Gopher's rules of quality and bounds on repetition (arXiv 2112.11446, A.1.1 and table A1).

Words are what white space parts; lines are those that hold more than white space. Where the paper leaves a choice it
is datatrove's: stop words in lower case and each counted once, "•" and "-" for bullets, duplicates without their first
occurrence, shares of all characters of the text.

Shape letters: N texts, W words of all texts, K places where repeated n-grams start, C n-grams.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain, count
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.corpus.stages import Verdict
from ulm.recipes.corpus import GopherQuality, GopherRepetition

STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
BULLETS = ("•", "-")
ELLIPSES = ("...", "…")
PARAGRAPH_END = re.compile(r"\n{2,}")

Ints = NDArray[np.int64]


def gopher_quality(texts: Sequence[str], config: GopherQuality) -> list[Verdict]:
    """Each text, and the first rule of quality that it breaks."""
    return [(text, reason and f"gopher_quality: {reason}") for text in texts for reason in [_flaw(text, config)]]


def gopher_repetition(texts: Sequence[str], config: GopherRepetition) -> list[Verdict]:
    """Each text, and the first bound on repetition that it exceeds: of paragraphs, of lines, of n-grams."""
    reasons = [_repeated_lines(text, config) for text in texts]
    open_N = [n for n, reason in enumerate(reasons) if reason is None]  # no need to look at the others' words
    for n, reason in zip(open_N, _repeated_ngrams([texts[n] for n in open_N], config), strict=True):
        reasons[n] = reason
    return [(text, reason and f"gopher_repetition: {reason}") for text, reason in zip(texts, reasons, strict=True)]


def full_lines(text: str) -> list[str]:
    """The lines that hold more than white space."""
    return [line for line in text.split("\n") if line and not line.isspace()]


def repeats(parts: Sequence[str]) -> tuple[int, int]:
    """How many parts have stood before, and their characters."""
    distinct = set(parts)
    return len(parts) - len(distinct), sum(map(len, parts)) - sum(map(len, distinct))


def _flaw(text: str, config: GopherQuality) -> str | None:
    words = text.split()
    num_words = len(words)
    if num_words < config.min_words:
        return "too_few_words"
    if num_words > config.max_words:
        return "too_many_words"
    if not words:
        return None
    if not config.min_mean_word_chars <= sum(map(len, words)) / num_words <= config.max_mean_word_chars:
        return "mean_word_length"
    if text.count("#") > config.max_symbol_word_ratio * num_words:
        return "too_many_hashes"
    if sum(map(text.count, ELLIPSES)) > config.max_symbol_word_ratio * num_words:
        return "too_many_ellipses"
    lines = full_lines(text)
    if sum(line.lstrip().startswith(BULLETS) for line in lines) > config.max_bullet_lines * len(lines):
        return "too_many_bullet_lines"
    if sum(line.rstrip().endswith(ELLIPSES) for line in lines) > config.max_ellipsis_lines * len(lines):
        return "too_many_ellipsis_lines"
    if sum(word.isalpha() or any(map(str.isalpha, word)) for word in words) < config.min_alphabetic_words * num_words:
        return "too_few_alphabetic_words"
    if len(STOP_WORDS.intersection(words)) < config.min_stop_words:
        return "too_few_stop_words"
    return None


def _repeated_lines(text: str, config: GopherRepetition) -> str | None:
    paragraphs = PARAGRAPH_END.split(text.strip())
    number, chars = repeats(paragraphs)
    if number > config.max_duplicate_paragraphs * len(paragraphs):
        return "duplicate_paragraphs"
    if chars > config.max_duplicate_paragraph_chars * len(text):
        return "duplicate_paragraph_chars"
    lines = full_lines(text)
    number, chars = repeats(lines)
    if number > config.max_duplicate_lines * len(lines):
        return "duplicate_lines"
    if chars > config.max_duplicate_line_chars * len(text):
        return "duplicate_line_chars"
    return None


class Repeated(NamedTuple):
    """All places in the texts where an n-gram starts that stands twice or more in the same text."""

    place_K: Ints  # ascending
    ngram_K: Ints  # which of the C n-grams starts there
    first_C: Ints  # the first place of each
    count_C: Ints  # 0 for an n-gram that is not repeated


def _repeated_ngrams(texts: Sequence[str], config: GopherRepetition) -> list[str | None]:
    """The first bound that each text's n-grams exceed."""
    words_N = [text.split() for text in texts]
    text_W = np.repeat(np.arange(len(texts)), list(map(len, words_N)))
    chars_W = np.fromiter(map(len, chain.from_iterable(words_N)), np.int64, len(text_W))
    chars_N = np.fromiter(map(len, texts), np.int64, len(texts))
    reasons: list[str | None] = [None] * len(texts)

    def note(name: str, counted_N: Ints, max_share: float) -> None:
        for text in np.flatnonzero(counted_N > max_share * chars_N):
            reasons[text] = reasons[text] or name

    top, duplicate = config.max_top_ngram_chars, config.max_duplicate_ngram_chars
    for n, ngrams in enumerate(_repeated(words_N, max((0, *top, *duplicate))), start=1):
        if n in top:
            note(f"top_{n}gram", _top_chars(n, ngrams, text_W, chars_W, len(texts)), top[n])
        if n in duplicate:
            note(f"duplicate_{n}grams", _duplicate_chars(n, ngrams, text_W, chars_W, len(texts)), duplicate[n])
    return reasons


def _repeated(words_N: Sequence[Sequence[str]], longest: int) -> Iterator[Repeated]:
    """The repeated n-grams of each text, for n = 1 to `longest`.

    An n-gram is the pair of the (n-1)-grams that start at its place and at the next. Both must be repeated for it to
    be, so that only the places that are left are looked at: in prose few beyond n = 3. No hash is involved.
    """
    number = count()  # runs on from text to text: the same word of two texts has two numbers
    ngram_K = np.fromiter(chain.from_iterable(_numbered(words, number) for words in words_N), np.int64)
    place_K = np.arange(len(ngram_K))
    for _ in range(longest):
        count_C = np.bincount(ngram_K)
        again = count_C[ngram_K] > 1
        place_K, ngram_K = place_K[again], ngram_K[again]
        count_C[count_C == 1] = 0
        first_C = np.zeros(len(count_C), dtype=np.int64)
        first_C[ngram_K[::-1]] = place_K[::-1]  # of several values NumPy keeps the last
        yield Repeated(place_K, ngram_K, first_C, count_C)
        joined = np.flatnonzero(place_K[1:] == place_K[:-1] + 1)
        pair_K = ngram_K[joined] * len(count_C) + ngram_K[joined + 1]
        place_K, ngram_K = place_K[joined], np.unique(pair_K, return_inverse=True)[1]


def _numbered(words: Sequence[str], number: Iterator[int]) -> Iterator[int]:
    """A number for each word, the next one for a word that is new."""
    numbers: defaultdict[str, int] = defaultdict(number.__next__)
    return map(numbers.__getitem__, words)


def _top_chars(n: int, ngrams: Repeated, text_W: Ints, chars_W: Ints, num_texts: int) -> Ints:
    """Characters within the most frequent repeated n-gram of each text, spaces between its words included."""
    frequent_C = np.flatnonzero(ngrams.count_C)
    first_C, count_C = ngrams.first_C[frequent_C], ngrams.count_C[frequent_C]
    rank_C = count_C * len(text_W) - first_C  # of equally frequent ones the earliest
    best_N = np.zeros(num_texts, dtype=np.int64)
    np.maximum.at(best_N, text_W[first_C], rank_C)
    best = np.flatnonzero(rank_C == best_N[text_W[first_C]])
    first, times = first_C[best], count_C[best]
    top_N = np.zeros(num_texts, dtype=np.int64)
    top_N[text_W[first]] = times * (n - 1 + sum(chars_W[first + k] for k in range(n)))
    return top_N


def _duplicate_chars(n: int, ngrams: Repeated, text_W: Ints, chars_W: Ints, num_texts: int) -> Ints:
    """Characters of the words of each text within n-grams that stood before, overlapping or not, each word once."""
    start_K = ngrams.place_K[ngrams.place_K != ngrams.first_C[ngrams.ngram_K]]
    num_words = len(text_W)
    open_W = np.bincount(start_K, minlength=num_words) - np.bincount(start_K + n, minlength=num_words + 1)[:num_words]
    within = np.flatnonzero(np.cumsum(open_W))
    return np.bincount(text_W[within], weights=chars_W[within], minlength=num_texts).astype(np.int64)
