"""Token embeddings by the book."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


def token(tokens_BT: NDArray[Any], weights: Mapping[str, NDArray[Any]], config: Mapping[str, Any]) -> NDArray[Any]:
    """x_BTD = onehot(tokens) E: arXiv 1706.03762, section 3.4, without its factor sqrt(d_model)."""
    table_VD = weights["weight"]
    onehot_BTV = np.equal(tokens_BT[..., None], np.arange(len(table_VD))).astype(np.float64)
    return onehot_BTV @ table_VD
