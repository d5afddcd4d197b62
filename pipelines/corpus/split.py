"""Which split a document belongs to: its files' own, else by the hash of its normalised text."""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from pipelines.corpus.dedup import KEY_BYTES
from ulm.corpus.manifest import SPLITS
from ulm.recipes.corpus import Split

_NAMED = re.compile(r"(?:(train|training)|(val|valid|validation|dev)|(test|testing))(?:-\d+-of-\d+)?", re.IGNORECASE)


def named_split(name: str) -> str | None:
    """The split that a file's stem or a dataset's split spells: `train`, `validation`, `test-00000-of-00002`."""
    match = _NAMED.fullmatch(name)
    return SPLITS[int(match.lastindex or 1) - 1] if match else None


def assign(
    keys: NDArray[np.bytes_], own: NDArray[np.int8], config: Split, *, needs_train: bool = True
) -> NDArray[np.int8]:
    """Index into SPLITS per document; `own` is the files' own or -1. Equal keys never part unless their files do so.

    Keys are uniform, so the first eight bytes are a number in [0, 1). Where no document falls into train, for
    there are too few of them, all that have no split of their own go there (`needs_train`).
    """
    share = keys.view(">u8").reshape(-1, KEY_BYTES // 8)[:, 0] / 2.0**64
    hashed = np.where(share < config.val, 1, np.where(share < config.val + config.test, 2, 0)).astype(np.int8)
    split = np.where(own >= 0, own, hashed).astype(np.int8)
    if needs_train and not (split == 0).any():
        split[own < 0] = 0
    return split
