"""Token embeddings by the book."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def token(
    tokens_BT: Array,
    weights: Mapping[str, Array],
    config: Mapping[str, Any],
    *,
    values_of_layer: int | None = None,
    num_layers: int = 0,
) -> Array | None:
    """x_BTD = onehot(tokens) E: arXiv 1706.03762, section 3.4, there always times sqrt(d_model). It has no values."""
    if values_of_layer is not None:
        return None
    x_BTD = _rows(tokens_BT, weights["weight"])
    return x_BTD * (np.sqrt(x_BTD.shape[-1]) if config["scaled"] else 1.0)


def value(
    tokens_BT: Array,
    weights: Mapping[str, Array],
    config: Mapping[str, Any],
    *,
    values_of_layer: int | None = None,
    num_layers: int = 0,
) -> Array | None:
    """As `token`; and for layer l, or l from the last, scale times the row of table l (arXiv 2410.17897, section 3)."""
    if values_of_layer is None:
        return token(tokens_BT, weights, config)
    ends = [*range(config["num_tables"])]
    used = [layer for layer in range(num_layers) if layer in ends or num_layers - 1 - layer in ends]
    if values_of_layer not in used:
        return None
    table = values_of_layer if values_of_layer <= num_layers - 1 - values_of_layer else num_layers - 1 - values_of_layer
    return weights["scales"][used.index(values_of_layer)] * _rows(tokens_BT, weights[f"tables.{table}"])


def _rows(tokens_BT: Array, table_VD: Array) -> Array:
    onehot_BTV = np.equal(tokens_BT[..., None], np.arange(len(table_VD))).astype(np.float64)
    return onehot_BTV @ table_VD
