"""Planted near duplicates and their exact similarity, by plain Python sets: what MinHash is held to."""

from __future__ import annotations

import random
import re


def planted_pairs(texts: list[str], share: float, seed: int) -> list[str]:
    """A copy of each text with that share of its words changed for others of the texts' words, at places by seed."""
    chance = random.Random(seed)
    vocabulary = sorted({word.casefold() for text in texts for word in re.findall(r"\w+", text)})
    return [_changed(text, share, vocabulary, chance) for text in texts]


def _changed(text: str, share: float, vocabulary: list[str], chance: random.Random) -> str:
    pieces = re.split(r"(\w+)", text)  # words at odd places
    places = range(1, len(pieces), 2)
    for place in chance.sample(places, round(share * len(places))):
        other = chance.choice(vocabulary)
        while other == pieces[place].casefold():
            other = chance.choice(vocabulary)
        pieces[place] = other
    return "".join(pieces)


def jaccard(a: str, b: str, n: int) -> float:
    """The exact Jaccard similarity of two texts' sets of n-grams of words; 0 where one has no words."""
    first, second = _shingles(a, n), _shingles(b, n)
    return len(first & second) / max(1, len(first | second)) if first and second else 0.0


def _shingles(text: str, n: int) -> set[tuple[str, ...]]:
    """n-grams of words; of a text with fewer words the one of them all. For scripts that part words by spaces."""
    words = re.findall(r"\w+", text.casefold())
    return {tuple(words[start : start + n]) for start in range(max(1, len(words) - n + 1))} if words else set()
