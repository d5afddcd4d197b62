"""Near duplicates: MinHash signatures, candidates by locality-sensitive hashing, clusters of what is alike.

Broder, "On the resemblance and containment of documents" (1997); Leskovec, Rajaraman and Ullman, "Mining of Massive
Datasets", chapter 3. A document is the set of its n-grams of words; J is the Jaccard similarity of two such sets. The
share of equal entries of two signatures estimates J with a standard error of at most sqrt(J (1 - J) / NUM_HASHES).

Shape letters: N documents, W words, E entries of a signature.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import rensa
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pipelines.corpus.ngrams import BASE, batch_word_hashes, ngram_hashes
from ulm.recipes.corpus import NearDuplicates

NUM_HASHES = 126  # 18 bands of 7 at the threshold 0.7
SEED = 1  # of the hash functions; another one gives other signatures
NO_WORDS = np.uint32(0xFFFF_FFFF)  # every entry of a text without words: the minimum of nothing
RECALL = 0.98  # of pairs one MARGIN above the threshold, by the bands alone
MARGIN = 0.1  # of J; at high thresholds half of what is left up to 1
NEIGHBOURS = 32  # that a document is compared with in a large bucket
CHUNK_ROWS = 1 << 14  # signatures looked at together: 8 MB


def signatures(texts: Sequence[str], config: NearDuplicates) -> NDArray[np.uint32]:
    """The MinHash signature_NE of each text, a function of that text alone.

    A text with fewer words than an n-gram is one n-gram of all its words.
    """
    hash_W, offset_N1 = batch_word_hashes(texts)
    length_N = np.diff(offset_N1)
    n = config.ngram_words
    ngrams = ngram_hashes(hash_W, n)
    shingle_W = np.zeros(len(hash_W), dtype=np.uint64)  # the one that starts with each word
    shingle_W[: len(ngrams)] = ngrams
    whole_W = np.repeat(offset_N1[1:], length_N) - np.arange(len(hash_W)) >= n  # does not run into the next text
    for short in np.flatnonzero((length_N > 0) & (length_N < n)):
        start, end = offset_N1[short], offset_N1[short + 1]
        shingle_W[start] = ngram_hashes(hash_W[start:end], end - start)[0]
        whole_W[start] = True
    num_shingles_N = np.where(length_N < n, length_N > 0, length_N - n + 1)
    ends = np.concatenate([[0], np.cumsum(num_shingles_N)]).astype(np.uint64)
    digests = rensa.RMinHash.digest_matrix_from_flat_token_hashes(shingle_W[whole_W], ends, NUM_HASHES, SEED)
    return np.array(digests.to_rows(), dtype=np.uint32).reshape(len(texts), NUM_HASHES)


def bands(config: NearDuplicates) -> tuple[int, int]:
    """(num_bands, rows_per_band): two documents are candidates where all entries of a band are equal.

    The longest bands, hence the fewest candidates, that find RECALL of the pairs one MARGIN above the threshold: a pair
    is found with probability 1 - (1 - J^rows)^bands (Mining of Massive Datasets, 3.4.2).
    """
    j = min(config.threshold + MARGIN, (config.threshold + 1) / 2)
    rows = max(r for r in range(1, NUM_HASHES + 1) if r == 1 or 1 - (1 - j**r) ** (NUM_HASHES // r) >= RECALL)
    return NUM_HASHES // rows, rows


def band_pairs(signature_NE: NDArray[np.uint32], band: int, config: NearDuplicates) -> NDArray[np.int64]:
    """Near duplicates i < j among a band's candidates, as pairs; `signature_NE` may be mapped from a file.

    A pair counts if its estimate of J is at most half a standard error below the threshold: two of three candidates
    whose J is just the threshold do then, and four of a hundred at 0.1 less (two errors lower, at 0.7).

    What is already linked through neighbours is not compared again: the pairs are fewer than all pairs, their clusters
    are the same. Only in a bucket of more than NEIGHBOURS + 1 documents a link may be missed, since each document is
    compared with that many on either side. They stand in the order of the next band, so that copies are mostly side by
    side; and documents that are alike share bands with few others besides those with many (boilerplate).
    """
    num_bands, rows = bands(config)
    starts = range(0, len(signature_NE), CHUNK_ROWS)
    columns = slice(band * rows, (band + 1) * rows)
    parts = [_keys(signature_NE[start : start + CHUNK_ROWS, columns]) for start in starts]
    key_N = np.concatenate([np.zeros(0, dtype=np.uint64), *parts])
    _, bucket_N, size = np.unique(key_N, return_inverse=True, return_counts=True)
    blank = _keys(np.full((1, rows), NO_WORDS))
    shared = np.flatnonzero((size[bucket_N] > 1) & (key_N != blank))
    next_band = (band + 1) % num_bands
    next_key = _keys(signature_NE[shared, next_band * rows : (next_band + 1) * rows])
    order = np.lexsort((next_key, key_N[shared]))  # by bucket, in it by the next band, then by index
    document, key = shared[order], key_N[shared[order]]
    chain = np.arange(len(document))  # of documents that each resemble the one before
    found = [np.zeros((0, 2), dtype=np.int64)]
    for distance in range(1, NEIGHBOURS + 1):
        left = np.flatnonzero((key[:-distance] == key[distance:]) & (chain[:-distance] != chain[distance:]))
        pairs = np.sort(np.stack([document[left], document[left + distance]], axis=1), axis=1)
        alike = _estimates(signature_NE, pairs) >= lowest_estimate(config)
        found.append(pairs[alike])
        if distance == 1:
            chain[left[alike] + 1] = 0
            chain = np.maximum.accumulate(chain)
    return np.concatenate(found)


def lowest_estimate(config: NearDuplicates) -> float:
    """The estimate of J from which on a pair counts: half a standard error below the threshold."""
    return config.threshold - math.sqrt(config.threshold * (1 - config.threshold) / NUM_HASHES) / 2


def clusters(num_documents: int, pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    """The lowest document of each document's cluster, itself if it is like no other; pairs come in any order."""
    if not num_documents:
        return np.zeros(0, dtype=np.int64)
    links = coo_array((np.ones(len(pairs), dtype=np.bool_), pairs.T), shape=(num_documents, num_documents))
    label_N = connected_components(links, directed=False)[1]
    return np.asarray(np.unique(label_N, return_index=True)[1][label_N], dtype=np.int64)


def _keys(entry_NE: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """One hash of each row's entries. Different rows may share one: their estimate parts them."""
    key_N = np.zeros(len(entry_NE), dtype=np.uint64)
    for column in entry_NE.T:
        key_N = key_N * np.uint64(BASE) + column
    return key_N


def _estimates(signature_NE: NDArray[np.uint32], pairs: NDArray[np.int64]) -> NDArray[np.float64]:
    """The estimate of J for each pair: the share of equal entries."""
    estimates = np.empty(len(pairs))
    for start in range(0, len(pairs), CHUNK_ROWS):
        first, second = pairs[start : start + CHUNK_ROWS].T
        equal = signature_NE[first] == signature_NE[second]
        estimates[start : start + CHUNK_ROWS] = np.count_nonzero(equal, axis=1) / NUM_HASHES
    return estimates
