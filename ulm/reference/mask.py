"""Who may look at whom, by the book: one query and one key at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ulm.reference.lookup import reference

PADDING = -1


@dataclass(frozen=True)
class Place:
    """Where a token stands: its position, its text's number (PADDING: no token), and how long its row's prefix is."""

    position: int
    segment: int = 0
    prefix_tokens: int = 0


def causal(query: Place, key: Place) -> bool:
    """Itself and what came before it: arXiv 1706.03762, section 3.2.3."""
    return key.position <= query.position


def prefix(query: Place, key: Place) -> bool:
    """What came before it, and all of the prefix: arXiv 1910.10683, section 3.2.1."""
    return key.position <= query.position or key.position < query.prefix_tokens


def document(query: Place, key: Place) -> bool:
    """Tokens of its own text: arXiv 2407.21783, section 3.2."""
    return key.segment == query.segment


def padding(query: Place, key: Place) -> bool:
    """No padding; what padding sees does not matter, so it may see anything."""
    return key.segment != PADDING or query.segment == PADDING


def table(kinds: Sequence[str], queries: Sequence[Place], keys: Sequence[Place]) -> NDArray[np.bool_]:
    """allowed_TS: what every one of these kinds allows."""
    conditions = [reference("mask", kind) for kind in kinds]
    return np.array([[all(allows(q, k) for allows in conditions) for k in keys] for q in queries])


def causal_table(num_new: int, num_known: int) -> NDArray[np.bool_]:
    """allowed_TS where the T new tokens are the last of S known ones of one text."""
    places = [Place(position) for position in range(num_known)]
    return table(["causal"], places[num_known - num_new :], places)
