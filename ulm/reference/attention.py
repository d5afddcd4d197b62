"""Attention by the book: one query, one head, one sum at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ulm.reference.position import Position

Array = NDArray[Any]


def softmax(x: Array) -> Array:
    """exp(x_i) / sum_j exp(x_j) over the last axis, shifted by the maximum so that nothing overflows."""
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def attend(
    q_BTHE: Array,
    k_BSKE: Array,
    v_BSKE: Array,
    allowed_BTS: NDArray[np.bool_],
    bias_BHTS: Array | None = None,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks_H: Array | None = None,
) -> Array:
    """softmax(q k^T / sqrt(E)) v over the allowed s: arXiv 1706.03762, equation 1; groups: arXiv 2305.13245, 2.2.

    `scale` stands in place of 1 / sqrt(E). soft_cap: arXiv 2408.00118, section 2.3; sinks, a score without a value:
    arXiv 2508.10925, section 2.1.2.
    """
    batch, num_new, num_heads, width = q_BTHE.shape
    heads_per_group = num_heads // k_BSKE.shape[2]
    out_BTHE = np.zeros_like(q_BTHE, dtype=np.float64)
    bias_BHTS = np.broadcast_to(
        np.zeros(1) if bias_BHTS is None else bias_BHTS, (batch, num_heads, *allowed_BTS.shape[1:])
    )
    for b, t, h in np.ndindex(batch, num_new, num_heads):
        seen = np.flatnonzero(allowed_BTS[b, t])
        k_SE, v_SE = k_BSKE[b, seen, h // heads_per_group], v_BSKE[b, seen, h // heads_per_group]
        scores = k_SE @ q_BTHE[b, t, h] * (1 / np.sqrt(width) if scale is None else scale)
        if soft_cap is not None:
            scores = soft_cap * np.tanh(scores / soft_cap)
        scores = scores + bias_BHTS[b, h, t, seen]
        if sinks_H is not None:
            scores, v_SE = np.append(scores, sinks_H[h]), np.concatenate([v_SE, np.zeros((1, width))])
        out_BTHE[b, t, h] = softmax(scores) @ v_SE
    return out_BTHE


def projected(
    x_BTD: Array,
    weights: Mapping[str, Array],
    config: Mapping[str, Any],
    positions_BT: Array,
    position: Position,
    values_BTJ: Array | None,
) -> tuple[Array, Array, Array]:
    """q_BTHE, k_BTKE, v_BTKE: each head from its rows of W_q, W_k, W_v, then normed and turned.

    Normed by itself: arXiv 2302.05442, section 2; with all others: arXiv 2501.00656, section 2.
    """
    width = config["head_dim"] or x_BTD.shape[-1] // config["num_heads"]

    def heads(name: str, num: int, more_BTJ: Array | float = 0.0) -> Array:
        all_heads = affine(x_BTD, weights, name) + more_BTJ
        return np.stack([all_heads[..., h * width : (h + 1) * width] for h in range(num)], axis=2)

    def normed(x_BTHE: Array, name: str) -> Array:
        if not config["qk_norm"]:
            return x_BTHE
        axes = (-2, -1) if config["qk_norm"] == "whole" else (-1,)
        mean_square = (x_BTHE**2).mean(axes, keepdims=True)
        weight = weights[f"{name}_norm.weight"].reshape(-1, width)  # a row for each head, or one for all
        return x_BTHE / np.sqrt(mean_square + config["qk_norm_eps"]) * weight

    q_BTHE = position.rotate(normed(heads("q", config["num_heads"]), "q"), positions_BT)
    k_BTKE = position.rotate(normed(heads("k", config["num_kv_heads"]), "k"), positions_BT)
    return q_BTHE, k_BTKE, heads("v", config["num_kv_heads"], 0.0 if values_BTJ is None else values_BTJ)


def affine(x: Array, weights: Mapping[str, Array], name: str) -> Array:
    """x W^T + b, without b where there is none."""
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)


def concatenated(out_BTHE: Array, weights: Mapping[str, Array]) -> Array:
    """Concat(head_1 … head_H) W_out: arXiv 1706.03762, section 3.2.2."""
    return affine(np.concatenate(list(np.moveaxis(out_BTHE, 2, 0)), axis=-1), weights, "out")


def gqa(
    x_BTD: Array,
    weights: Mapping[str, Array],
    config: Mapping[str, Any],
    *,
    positions_BT: Array,
    allowed_BTS: NDArray[np.bool_],
    position: Position,
    values_BTJ: Array | None = None,
) -> Array:
    """Each head with its group's keys and values: arXiv 2305.13245, section 2.2."""
    q_BTHE, k_BTKE, v_BTKE = projected(x_BTD, weights, config, positions_BT, position, values_BTJ)
    bias_BHTS = position.bias(positions_BT, positions_BT)
    sinks_H = weights["sinks"] if config["sinks"] else None
    out_BTHE = attend(
        *(q_BTHE, k_BTKE, v_BTKE, allowed_BTS, bias_BHTS),
        scale=config["scale"],
        soft_cap=config["soft_cap"],
        sinks_H=sinks_H,
    )
    return concatenated(out_BTHE, weights)


def sliding(
    x_BTD: Array,
    weights: Mapping[str, Array],
    config: Mapping[str, Any],
    *,
    positions_BT: Array,
    allowed_BTS: NDArray[np.bool_],
    position: Position,
    values_BTJ: Array | None = None,
) -> Array:
    """`gqa` of keys that are among the last `window_tokens` (arXiv 2004.05150, 3.1) or the first few (2309.17453)."""
    distance_BTS = positions_BT[:, :, None] - positions_BT[:, None, :]
    is_sink_BTS = np.broadcast_to(positions_BT[:, None, :] < config["num_sink_tokens"], distance_BTS.shape)
    seen_BTS = allowed_BTS & ((distance_BTS < config["window_tokens"]) | is_sink_BTS)
    return gqa(
        x_BTD,
        weights,
        config,
        positions_BT=positions_BT,
        allowed_BTS=seen_BTS,
        position=position,
        values_BTJ=values_BTJ,
    )


def linear(
    x_BTD: Array,
    weights: Mapping[str, Array],
    config: Mapping[str, Any],
    *,
    positions_BT: Array,
    allowed_BTS: NDArray[np.bool_],
    position: Position,
    values_BTJ: Array | None = None,
) -> Array:
    """Shares phi(q) phi(k_s) / sum_j phi(q) phi(k_j), phi(x) = elu(x) + 1: arXiv 2006.16236, equations 3, 4 and 7.

    Positions turn the features above the fraction line alone: arXiv 2104.09864, equation 19.
    """
    q_BTHE, k_BTKE, v_BTKE = projected(x_BTD, weights, config, positions_BT, Position(), values_BTJ)
    phi_q, phi_k = (np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))) for x in (q_BTHE, k_BTKE))
    turned_q, turned_k = (position.rotate(phi, positions_BT) for phi in (phi_q, phi_k))
    return _by_features((turned_q, turned_k), (phi_q, phi_k), v_BTKE, allowed_BTS, weights)


def performer(
    x_BTD: Array,
    weights: Mapping[str, Array],
    config: Mapping[str, Any],
    *,
    positions_BT: Array,
    allowed_BTS: NDArray[np.bool_],
    position: Position,
    values_BTJ: Array | None = None,
) -> Array:
    """Shares from SM+ features h(x) (exp(w_1 x), ..., exp(w_m x)), h(x) = exp(-|x|^2 / 2) / sqrt(m).

    arXiv 2009.14794, equation 5 and lemma 1, of queries and keys divided by E^(1/4), so that q k is q k / sqrt(E).
    """
    q_BTHE, k_BTKE, v_BTKE = projected(x_BTD, weights, config, positions_BT, position, values_BTJ)

    def phi(x_E: Array) -> Array:
        x_E = x_E / len(x_E) ** 0.25
        waves = np.array([np.exp(np.dot(w_E, x_E)) for w_E in weights["w_FE"]])
        return np.exp(-np.dot(x_E, x_E) / 2) / np.sqrt(config["num_features"]) * waves

    features = tuple(np.apply_along_axis(phi, -1, x) for x in (q_BTHE, k_BTKE))
    return _by_features((features[0], features[1]), (features[0], features[1]), v_BTKE, allowed_BTS, weights)


def _by_features(
    above: tuple[Array, Array],
    below: tuple[Array, Array],
    v_BTKE: Array,
    allowed_BTS: NDArray[np.bool_],
    weights: Mapping[str, Array],
) -> Array:
    """sum_s (q k_s) v_s with the features above, divided by sum_s q k_s with those below; one pair at a time."""
    batch, num_new, num_heads = above[0].shape[:3]
    heads_per_group = num_heads // v_BTKE.shape[2]
    out_BTHE = np.zeros((batch, num_new, num_heads, v_BTKE.shape[-1]))
    for b, t, h in np.ndindex(batch, num_new, num_heads):
        group, total = h // heads_per_group, 0.0
        for s in np.flatnonzero(allowed_BTS[b, t]):
            out_BTHE[b, t, h] += np.dot(above[0][b, t, h], above[1][b, s, group]) * v_BTKE[b, s, group]
            total += np.dot(below[0][b, t, h], below[1][b, s, group])
        out_BTHE[b, t, h] /= total
    return concatenated(out_BTHE, weights)


def cross(
    x_BTD: Array,
    source_BSD: Array,
    weights: Mapping[str, Array],
    config: Mapping[str, Any],
    is_source_BS: NDArray[np.bool_] | None = None,
) -> Array:
    """Queries from x, keys and values from the source, which each query sees whole: arXiv 1706.03762, 3.2.3."""
    is_source_BS = np.ones(source_BSD.shape[:2], bool) if is_source_BS is None else is_source_BS
    positions_BT, positions_BS = (np.zeros(x.shape[:2], int) for x in (x_BTD, source_BSD))
    q_BTHE, _, _ = projected(x_BTD, weights, config, positions_BT, Position(), None)
    _, k_BSKE, v_BSKE = projected(source_BSD, weights, config, positions_BS, Position(), None)
    allowed_BTS = np.repeat(is_source_BS[:, None], x_BTD.shape[1], axis=1)
    sinks_H = weights["sinks"] if config["sinks"] else None
    out_BTHE = attend(
        *(q_BTHE, k_BSKE, v_BSKE, allowed_BTS), scale=config["scale"], soft_cap=config["soft_cap"], sinks_H=sinks_H
    )
    return concatenated(out_BTHE, weights)
