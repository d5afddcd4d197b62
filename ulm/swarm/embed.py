"""Text to a unit vector: tf-idf, SVD, L2 norm (c-BTM, arXiv 2303.14177, section 3.1), in NumPy alone.

scikit-learn fits the parts (pipelines/corpus/domains.py); tests hold this transform to scikit-learn's own. Stop words
need no list here: fitting leaves them out of the vocabulary, and a word outside it counts for nothing.

Shape letters: V words of the vocabulary, D dimensions of the embedding.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_CHARS = 4_000  # of a text's end that are looked at: a re-weighing costs the same however long the text has become
NUMBER = "#NUMBER"
_WORD = re.compile(r"\w\w+")


def words(text: str) -> list[str]:
    """Lower-case words of two letters or more, in order; whatever begins with a digit is the word #NUMBER."""
    return [NUMBER if word[0].isdigit() else word for word in _WORD.findall(text.lower())]


@dataclass(frozen=True)
class Embedder:
    """A fitted tf-idf and SVD."""

    vocabulary: Mapping[str, int]  # word to its row
    idf_V: NDArray[np.float64]
    components_VD: NDArray[np.float32]

    def __call__(self, text: str) -> NDArray[np.float64] | None:
        """The unit vector h_D of the text's last MAX_CHARS characters; None where no word of it is known."""
        known = Counter(row for word in words(text[-MAX_CHARS:]) if (row := self.vocabulary.get(word)) is not None)
        if not known:
            return None
        rows = np.fromiter(known, dtype=np.int64, count=len(known))
        tf_idf = np.fromiter(known.values(), dtype=np.float64, count=len(known)) * self.idf_V[rows]
        h_D: NDArray[np.float64] = (tf_idf / np.linalg.norm(tf_idf)) @ self.components_VD[rows].astype(np.float64)
        length = float(np.linalg.norm(h_D))
        return h_D / length if length > 0 else None
