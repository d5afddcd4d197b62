"""Attention by the book: one query, one head, one sum at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Rotate = Callable[[NDArray[Any], NDArray[Any]], NDArray[Any]]


def softmax(x: NDArray[Any]) -> NDArray[Any]:
    """exp(x_i) / sum_j exp(x_j) over the last axis, shifted by the maximum so that nothing overflows."""
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def attend(
    q_BTHE: NDArray[Any], k_BSKE: NDArray[Any], v_BSKE: NDArray[Any], allowed_BTS: NDArray[np.bool_]
) -> NDArray[Any]:
    """softmax(q k^T / sqrt(E)) v over the allowed s: arXiv 1706.03762, equation 1; groups: arXiv 2305.13245, 2.2."""
    batch, num_new, num_heads, width = q_BTHE.shape
    heads_per_group = num_heads // k_BSKE.shape[2]
    out_BTHE = np.zeros_like(q_BTHE, dtype=np.float64)
    for b, t, h in np.ndindex(batch, num_new, num_heads):
        seen = np.flatnonzero(allowed_BTS[b, t])
        k_SE, v_SE = k_BSKE[b, seen, h // heads_per_group], v_BSKE[b, seen, h // heads_per_group]
        out_BTHE[b, t, h] = softmax(k_SE @ q_BTHE[b, t, h] / np.sqrt(width)) @ v_SE
    return out_BTHE


def gqa(
    x_BTD: NDArray[Any],
    weights: Mapping[str, NDArray[Any]],
    config: Mapping[str, Any],
    *,
    positions_BT: NDArray[Any],
    allowed_BTS: NDArray[np.bool_],
    rotate: Rotate,
) -> NDArray[Any]:
    """Concat(head_1 … head_H) W_out, each head from its W_q and its group's W_k, W_v: arXiv 2305.13245, section 2.2."""
    width = config["head_dim"] or x_BTD.shape[-1] // config["num_heads"]

    def heads(name: str, num: int) -> NDArray[Any]:
        each = [x_BTD @ weights[f"{name}.weight"][h * width : (h + 1) * width].T for h in range(num)]
        return np.stack(each, axis=2)

    q_BTHE = rotate(heads("q", config["num_heads"]), positions_BT)
    k_BSKE = rotate(heads("k", config["num_kv_heads"]), positions_BT)
    out_BTHE = attend(q_BTHE, k_BSKE, heads("v", config["num_kv_heads"]), allowed_BTS)
    return np.concatenate(list(np.moveaxis(out_BTHE, 2, 0)), axis=-1) @ weights["out.weight"].T
