"""Short passages of training text, as a server sees them: what the router learns to tell apart, and what it calls far.

Shape letters: N documents, L lengths, M passages, C clusters, D dimensions of the embedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from ulm.swarm.router import FAR_CHARS, nearest_squared

NUM_SNIPPETS = 1_000  # passages of each of FAR_CHARS, which say what is far: 10 lie beyond the 99th percentile
FAR_PERCENTILE = 99.0  # of training text's own snippets: one in a hundred is taken for foreign
MIN_CHARS, MAX_CHARS = 80, 1_500  # of the passages that a head learns from, log-uniform: prompts, and answers so far
MIN_PASSAGES, MAX_PASSAGES = 4_000, 20_000  # of them: as many as documents, between the two


class Passages:
    """Passages cut from documents while these go by; `tokens_N` are the documents' tokens, in the order of the texts.

    `snippets`, for each of FAR_CHARS, are cut at random places, in proportion to tokens. Of `texts`, which come from
    the documents `document`, half are cut like that, and half are beginnings, of any document as often: what a prompt
    looks like.
    """

    def __init__(self, tokens_N: NDArray[np.int64], seed: int) -> None:
        self.snippets: list[list[str]] = [[] for _ in FAR_CHARS]
        self.texts: list[str] = []
        self.document: list[int] = []
        self._generator = np.random.default_rng(seed)
        number = min(MAX_PASSAGES, max(MIN_PASSAGES, len(tokens_N))) // 2
        by_tokens_N = np.maximum(tokens_N, 1) / np.maximum(tokens_N, 1).sum()
        alike_N = np.full(len(tokens_N), 1 / len(tokens_N))
        draw = self._generator.multinomial
        self._snippets_N, self._inner_N = draw(NUM_SNIPPETS, by_tokens_N), draw(number, by_tokens_N)
        self._first_N = draw(number, alike_N)

    def of(self, texts: Iterable[str]) -> Iterator[str]:
        """The same texts, with passages taken from each on its way."""
        for index, text in enumerate(texts):
            for length, snippets in zip(FAR_CHARS, self.snippets, strict=True):
                snippets += self._cut(text, np.full(self._snippets_N[index], length))
            inner = self._cut(text, self._lengths(self._inner_N[index]))
            own = inner + [text[:length] for length in self._lengths(self._first_N[index])]
            self.texts += own
            self.document += [index] * len(own)
            yield text

    def _lengths(self, count: int) -> NDArray[np.int64]:
        logs = self._generator.uniform(np.log(MIN_CHARS), np.log(MAX_CHARS), count)
        return np.exp(logs).astype(np.int64)

    def _cut(self, text: str, lengths: NDArray[np.int64]) -> list[str]:
        starts = self._generator.integers(0, np.maximum(1, len(text) - lengths + 1))
        return [text[start : start + length] for start, length in zip(starts, lengths, strict=True)]


def far_distances(p_LMD: NDArray[np.float64], centroids_CD: NDArray[np.float64]) -> list[float]:
    """For each length the squared distance to the nearest centroid that FAR_PERCENTILE of its snippets stay within.

    p_LMD is what the SVD sees of them; see `Router.is_far`.
    """
    return [float(np.percentile(nearest_squared(p_MD, centroids_CD), FAR_PERCENTILE)) for p_MD in p_LMD]
