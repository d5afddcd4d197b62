"""Exact duplicates, blind to case and white space."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

KEY_BYTES = 16  # of SHA-256: 2^64 documents before two different ones are likely to meet


def content_key(text: str) -> bytes:
    """The same KEY_BYTES for texts that differ only in case and white space."""
    return hashlib.sha256(" ".join(text.casefold().split()).encode()).digest()[:KEY_BYTES]


def is_first(keys: NDArray[np.bytes_]) -> NDArray[np.bool_]:
    """True at the first document with each key, in the given order."""
    first = np.zeros(len(keys), dtype=np.bool_)
    first[np.unique(keys, return_index=True)[1]] = True  # numpy returns the first of equal values
    return first
