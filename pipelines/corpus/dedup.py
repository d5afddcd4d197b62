"""Exact duplicates, blind to case and white space."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

KEY_BYTES = 16  # of SHA-256: 2^64 documents before two different ones are likely to meet


def content_key(text: str) -> bytes:
    """The same KEY_BYTES for texts that differ only in case and white space."""
    return hashlib.sha256(" ".join(text.casefold().split()).encode()).digest()[:KEY_BYTES]


def content_id(encoded: bytes) -> bytes:
    """What names a document: KEY_BYTES of the SHA-256 of its text."""
    return hashlib.sha256(encoded).digest()[:KEY_BYTES]


def keepers(groups: NDArray[np.int64], rank: NDArray[np.int8]) -> NDArray[np.int64]:
    """For each document the one of its group that stays: of the lowest rank, the first in order."""
    order = np.lexsort((np.arange(len(groups)), rank, groups))
    first = np.ones(len(groups), dtype=np.bool_)
    first[1:] = groups[order][1:] != groups[order][:-1]
    leader = np.empty(len(groups), np.int64)
    leader[order] = order[first][np.cumsum(first) - 1]
    return leader


def groups_of(keys: NDArray[np.bytes_]) -> NDArray[np.int64]:
    """A number per document, the same for equal keys."""
    return np.unique(keys, return_inverse=True)[1].astype(np.int64)
