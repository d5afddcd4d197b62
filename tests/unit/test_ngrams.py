"""Hashes of words and n-grams: the same as the slow way, blind to case and punctuation, the same everywhere."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.corpus.ngrams import BASE, BLOCK_CHARS, batch_word_hashes, ngram_hashes, word_hashes

TO_ROMANIAN = st.characters(max_codepoint=0x24F)  # capital letters whose case-folded form is two characters among them


def mix(number: int) -> int:
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    number = (number ^ number >> 27) * 0x94D049BB133111EB % 2**64
    return number ^ number >> 31


def slow_hash(word: str) -> int:
    return mix(sum(ord(letter) * pow(BASE, BLOCK_CHARS + place, 2**64) for place, letter in enumerate(word)) % 2**64)


@given(st.text(TO_ROMANIAN))
def test_words_are_the_runs_that_a_regular_expression_finds(text: str) -> None:
    words = re.findall(r"[\w\u0300-\u036f]+", text.casefold())
    assert word_hashes(text).tolist() == [slow_hash(word) for word in words]


@given(st.text())
def test_hashes_are_blind_to_case_in_all_scripts(text: str) -> None:
    assert word_hashes(text.casefold()).tolist() == word_hashes(text).tolist()


@given(st.lists(st.text() | st.text(TO_ROMANIAN)))
def test_a_batch_is_its_texts_one_by_one(texts: list[str]) -> None:
    words, offsets = batch_word_hashes(texts)
    assert [words[a:b].tolist() for a, b in zip(offsets, offsets[1:], strict=False)] == [
        word_hashes(text).tolist() for text in texts
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        ("... -- \u2014 \u00a7 !", []),
        ("Don\u2019t STOP, re-use snake_case 3.14!", ["don", "t", "stop", "re", "use", "snake_case", "3", "14"]),
        ("STRASSE stra\u00dfe", ["strasse", "strasse"]),
        (
            "\u6f22\u5b57\u304b\u306a, \u30ab\u30caabc",
            [*"\u6f22\u5b57\u304b\u306a\u30ab\u30ca", "abc"],
        ),
        ("\u0e01\u0e32\u0e23", [*"\u0e01\u0e32\u0e23"]),
        ("\u0939\u093f\u0928\u094d\u0926\u0940 \uc11c\uc6b8", ["\u0939\u093f\u0928\u094d\u0926\u0940", "\uc11c\uc6b8"]),
        ("\U00020000\U00020001 \U0001f600", ["\U00020000", "\U00020001"]),
    ],
    ids=["empty", "no word", "English", "sharp s", "Han and Kana", "Thai", "Hindi and Korean", "plane 2 and emoji"],
)
def test_words_of_each_script(text: str, words: list[str]) -> None:
    assert word_hashes(text).tolist() == [slow_hash(word) for word in words]


def test_hashes_are_the_same_on_every_machine_and_day() -> None:
    assert word_hashes("The end").tolist() == [0xF8B0A4DAA6FC3F67, 0x347A1D85379455EE]
    assert ngram_hashes(word_hashes("The end"), 2).tolist() == [0x6DBA6E23152BCB94]


def test_a_word_has_one_hash_wherever_it_stands_even_across_blocks() -> None:
    words = [f"word{number}" for number in range(BLOCK_CHARS // 4)]
    found = word_hashes(" ".join(words))
    assert len(set(found.tolist())) == len(words)
    assert found[::97].tolist() == [slow_hash(word) for word in words[::97]]
    long = "x" * (3 * BLOCK_CHARS)
    assert word_hashes(f"{long} end {long}y")[:2].tolist() == [slow_hash(long), slow_hash("end")]


@given(st.lists(st.integers(0, 2), max_size=30), st.integers(1, 8))
def test_ngrams_are_equal_exactly_where_their_words_are(numbers: list[int], n: int) -> None:
    hashes = ngram_hashes(np.array([mix(number) for number in numbers], dtype=np.uint64), n).tolist()
    ngrams = [tuple(numbers[start : start + n]) for start in range(len(numbers) - n + 1)]
    assert len(hashes) == len(ngrams)
    assert len(set(hashes)) == len(set(ngrams)) == len(set(zip(hashes, ngrams, strict=True)))
