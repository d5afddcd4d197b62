"""Who may look at whom, by the book."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def causal(num_new: int, num_known: int) -> NDArray[np.bool_]:
    """allowed_TS: the T new tokens are the last of S known ones; each sees itself and what came before it."""
    first = num_known - num_new
    return np.array([[s <= first + t for s in range(num_known)] for t in range(num_new)])
