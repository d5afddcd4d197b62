"""Words and n-grams of words as 64-bit hashes: what near duplicates and decontamination compare.

The hashes are the same in every process, on every platform and in every batch. Two different words, or n-grams, of a
billion different ones meet with a chance of about 3 % (birthday bound of 2^64).

Shape letters: N texts, W words, C characters (code points).
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

BASE = 0x9E3779B97F4A7C15  # odd; Weyl's constant of splitmix64 (Steele, Lea and Flood, OOPSLA 2014)
BLOCK_CHARS = 1 << 16  # hashed at a time: the arrays of a block stay in the second cache
LAST_LETTER = 0x3FFFF  # no letter beyond planes 0 to 3 (Unicode 17)

APART, JOINED, ALONE = 0, 1, 2  # what a character is: between words, part of one, or a word of its own
# Blocks of scripts that are written without spaces; Hangul, Tibetan and Ethiopic have theirs.
ALONE_BLOCKS = [
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x3005, 0x3007),  # marks that stand for a Han character
    (0x3040, 0x30FF),  # Kana
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),  # Han
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0xFF66, 0xFF9F),  # half-width Katakana
    (0x1AFF0, 0x1B16F),  # Kana, older forms
    (0x20000, 0x3FFFF),  # Han, planes 2 and 3
]


def word_hashes(text: str) -> NDArray[np.uint64]:
    """A hash for each word of a text, in order, blind to case and punctuation.

    A word is a run of letters, digits, marks and underscores; in scripts written without spaces it is a character.
    """
    return batch_word_hashes([text])[0]


def batch_word_hashes(texts: Sequence[str]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Hashes of the words of all texts, hash_W, and offset_N1: words offset[n] to offset[n + 1] are text n's."""
    folded = [text.casefold() for text in texts]
    code_C = np.frombuffer("\n".join(folded).encode("utf-32-le", "surrogatepass"), dtype="<u4")
    kind_C = _kind_by_code()[code_C]
    start_W, end_W = _bounds(kind_C)
    first_char_N1 = np.cumsum([0, *(len(text) + 1 for text in folded)])
    return _hash_spans(code_C, start_W, end_W), np.searchsorted(start_W, first_char_N1)


def ngram_hashes(words: NDArray[np.uint64], n: int) -> NDArray[np.uint64]:
    """A hash for each run of n words, in order: max(0, W - n + 1) of them; equal runs have equal hashes."""
    num_ngrams = max(0, len(words) - n + 1)
    hashes = np.zeros(num_ngrams, dtype=np.uint64)
    for place in range(n):
        hashes *= np.uint64(BASE)
        hashes += words[place : place + num_ngrams]
    return _mix(hashes)


@functools.cache
def _kind_by_code() -> NDArray[np.uint8]:
    """APART, JOINED or ALONE for each of Unicode's code points."""
    letters = [
        character.isalnum() or character == "_" or unicodedata.category(character)[0] == "M"
        for character in map(chr, range(LAST_LETTER + 1))
    ]
    kinds = np.zeros(0x110000, dtype=np.uint8)
    kinds[: len(letters)] = letters
    for first, last in ALONE_BLOCKS:
        kinds[first : last + 1] *= ALONE
    return kinds


def _bounds(kind_C: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where each word starts, and the place after its end."""
    joined_C2 = np.zeros(len(kind_C) + 2, dtype=np.bool_)  # with a place before the text and one after it
    np.equal(kind_C, JOINED, out=joined_C2[1:-1])
    alone_C = kind_C == ALONE
    start_W = np.flatnonzero((joined_C2[1:-1] & ~joined_C2[:-2]) | alone_C)
    end_W = np.flatnonzero((joined_C2[1:-1] & ~joined_C2[2:]) | alone_C) + 1
    return start_W, end_W


def _hash_spans(code_C: NDArray[np.uint32], start_W: NDArray[np.int64], end_W: NDArray[np.int64]) -> NDArray[np.uint64]:
    """A hash of the characters of each word: the sum of code[i] * BASE^(i - start), modulo 2^64, mixed.

    Sums of whole blocks are differences of one running sum; that shifts the powers of a word by its start in the
    block, and a factor BASE^(BLOCK_CHARS - start) brings all words to the same power.
    """
    hash_W = np.empty(len(start_W), dtype=np.uint64)
    first = 0
    while first < len(start_W):
        begin = start_W[first]
        last = max(first + 1, int(np.searchsorted(end_W, begin + BLOCK_CHARS, side="right")))
        num_chars = end_W[last - 1] - begin
        power_C = _powers(max(BLOCK_CHARS, int(num_chars)))  # one word may be longer than a block
        sum_C1 = np.zeros(num_chars + 1, dtype=np.uint64)
        np.cumsum(code_C[begin : begin + num_chars] * power_C[:num_chars], out=sum_C1[1:])
        start, end = start_W[first:last] - begin, end_W[first:last] - begin
        hash_W[first:last] = (sum_C1[end] - sum_C1[start]) * power_C[BLOCK_CHARS - start]
        first = last
    return _mix(hash_W)


@functools.lru_cache(maxsize=1)
def _powers(largest: int) -> NDArray[np.uint64]:
    """BASE^0 to BASE^largest, modulo 2^64."""
    factors = np.full(largest + 1, BASE, dtype=np.uint64)
    factors[0] = 1
    return np.cumprod(factors, dtype=np.uint64)


def _mix(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finalizer, which carries each bit to all others (Steele, Lea and Flood, OOPSLA 2014)."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))
