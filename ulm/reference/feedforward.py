"""Feed-forward layers by the book."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ulm.reference.attention import affine


def swiglu(x_BTD: NDArray[Any], weights: Mapping[str, NDArray[Any]], config: Mapping[str, Any]) -> NDArray[Any]:
    """(Swish_1(x W) * x V) W_2 with Swish_1(z) = z / (1 + exp(-z)): arXiv 2002.05202, equation 6."""
    gate = x_BTD @ weights["gate.weight"].T
    swish = gate / (1 + np.exp(-gate))
    return (swish * (x_BTD @ weights["up.weight"].T)) @ weights["out.weight"].T


def relu(x_BTD: NDArray[Any], weights: Mapping[str, NDArray[Any]], config: Mapping[str, Any]) -> NDArray[Any]:
    """max(0, x W_1 + b_1) W_2 + b_2: arXiv 1706.03762, equation 2."""
    hidden = affine(x_BTD, weights, "up")
    return affine(np.where(hidden > 0, hidden, 0.0), weights, "out")


def relu2(x_BTD: NDArray[Any], weights: Mapping[str, NDArray[Any]], config: Mapping[str, Any]) -> NDArray[Any]:
    """The square of ReLU in its place: arXiv 2109.08668, section 3.1."""
    hidden = affine(x_BTD, weights, "up")
    return affine(np.where(hidden > 0, hidden * hidden, 0.0), weights, "out")


def gelu(x_BTD: NDArray[Any], weights: Mapping[str, NDArray[Any]], config: Mapping[str, Any]) -> NDArray[Any]:
    """GELU(x W_1 + b_1) W_2 + b_2: arXiv 1606.08415."""
    return affine(_gelu(affine(x_BTD, weights, "up"), config["approximate"]), weights, "out")


def geglu(x_BTD: NDArray[Any], weights: Mapping[str, NDArray[Any]], config: Mapping[str, Any]) -> NDArray[Any]:
    """(GELU(x W) * x V) W_2: arXiv 2002.05202, equation 6."""
    gate = _gelu(affine(x_BTD, weights, "gate"), config["approximate"])
    return affine(gate * affine(x_BTD, weights, "up"), weights, "out")


def _gelu(z: NDArray[Any], approximate: bool) -> NDArray[Any]:
    """z P(X <= z) for a normal X; the share by the error function, or by its approximation in section 2."""
    if approximate:
        return 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    share = np.array([0.5 * (1 + math.erf(value / math.sqrt(2))) for value in z.flat])
    return z * share.reshape(z.shape)


def moe(x_BTD: NDArray[Any], weights: Mapping[str, NDArray[Any]], config: Mapping[str, Any]) -> NDArray[Any]:
    """sum_i Softmax(TopK(x W_g))_i SwiGLU_i(x), one token at a time: arXiv 2401.04088, section 2.1.

    The only one by its share of all, p_i(x): arXiv 2101.03961, equation 2.
    """
    out_BTD = np.zeros_like(x_BTD)
    for b, t in np.ndindex(x_BTD.shape[:2]):
        scores = weights["router.weight"] @ x_BTD[b, t]
        best = sorted(range(config["num_experts"]), key=lambda e: -scores[e])[: config["experts_per_token"]]
        powers = np.exp(scores - scores.max())
        total = powers.sum() if len(best) == 1 else powers[best].sum()
        for e, share in zip(best, powers[best] / total, strict=True):
            of_expert = {
                name.removeprefix(f"experts.{e}."): w for name, w in weights.items() if name.startswith(f"experts.{e}.")
            }
            out_BTD[b, t] += share * swiglu(x_BTD[b, t][None], of_expert, {})[0]
    return out_BTD


def balance_loss(scores_MN: NDArray[Any], experts_per_token: int) -> float:
    """N sum_i f_i P_i over the tokens of a batch: arXiv 2101.03961, equations 4 to 6, f the share of all choices."""
    num_tokens, num = scores_MN.shape
    f, p = np.zeros(num), np.zeros(num)
    for scores in scores_MN:
        for e in sorted(range(num), key=lambda e: -scores[e])[:experts_per_token]:
            f[e] += 1 / (num_tokens * experts_per_token)
        p += np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum() / num_tokens
    return float(num * np.dot(f, p))
