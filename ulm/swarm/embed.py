"""Text to a unit vector: tf-idf, SVD, L2 norm (c-BTM, arXiv 2303.14177, section 3.1), in NumPy alone.

scikit-learn fits the parts (pipelines/corpus/domains.py); tests hold this transform to scikit-learn's own. Unlike in
c-BTM punctuation marks are words too, none is a stop word, and of a word's frequency its logarithm counts: short
passages are told apart better (docs/experiments.md).

Shape letters: V words of the vocabulary, D dimensions of the embedding.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

MAX_CHARS = 4_000  # of a text's end that are looked at: a re-weighing costs the same however long the text has become
NUMBER = "#NUMBER"
_WORD = re.compile(r"\w\w+|[^\w\s]")


def words(text: str) -> list[str]:
    """Lower-case words of two letters or more, and marks, in order; what begins with a digit is the word #NUMBER."""
    return [NUMBER if word[0].isdigit() else word for word in _WORD.findall(text.lower())]


@dataclass(frozen=True)
class Embedder:
    """A fitted tf-idf and SVD."""

    vocabulary: Mapping[str, int]  # word to its row
    idf_V: NDArray[np.float64]
    components_VD: NDArray[np.float32]
    sublinear: bool = True  # 1 + log of a word's count in place of the count, as the first routers have it

    def __call__(self, text: str) -> NDArray[np.float64] | None:
        """The unit vector h_D of the text's last MAX_CHARS characters; None where no word of it is known."""
        p_D = self.project(text)
        length = 0.0 if p_D is None else float(np.linalg.norm(p_D))
        return p_D / length if p_D is not None and length > 0 else None

    def project(self, text: str) -> NDArray[np.float64] | None:
        """What of the text's unit tf-idf vector the SVD sees, as p_D; None where it has no words.

        Words that training never had are part of that vector, each as rare as the rarest: p_D is short for text that
        has many of them, and for text whose words never went together.
        """
        rows, tf_idf, length = self.weighted(text[-MAX_CHARS:])
        if not length:
            return None
        return np.asarray((tf_idf / length) @ self.components_VD[rows].astype(np.float64))

    def weighted(self, text: str) -> tuple[NDArray[np.int64], NDArray[np.float64], float]:
        """Rows of the words of a text that are known, their tf-idf, and the length of the whole text's vector."""
        count_of = Counter(words(text))
        row_of = self.vocabulary.get
        found = np.array([row_of(word, -1) for word in count_of], dtype=np.int64)
        tf = np.fromiter(count_of.values(), dtype=np.float64, count=len(count_of))
        if self.sublinear:
            tf = 1.0 + np.log(tf)
        is_known = found >= 0
        tf_idf = tf * np.where(is_known, self.idf_V[found], self._highest_idf)
        return found[is_known], tf_idf[is_known], float(np.linalg.norm(tf_idf))

    @cached_property
    def _highest_idf(self) -> float:
        return float(self.idf_V.max())
