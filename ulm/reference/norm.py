"""Norms by the book."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


def rmsnorm(x_BTD: NDArray[Any], weights: Mapping[str, NDArray[Any]], config: Mapping[str, Any]) -> NDArray[Any]:
    """a_i / RMS(a) g_i with RMS(a) = sqrt(sum a_i^2 / n): arXiv 1910.07467, equation 4; eps stands under the root."""
    sums = (x_BTD**2).sum(axis=-1, keepdims=True)
    return x_BTD / np.sqrt(sums / x_BTD.shape[-1] + config["eps"]) * weights["weight"]


def layernorm(x_BTD: NDArray[Any], weights: Mapping[str, NDArray[Any]], config: Mapping[str, Any]) -> NDArray[Any]:
    """g (a - mu) / sigma + b, mu and sigma over the units of a layer: arXiv 1607.06450, equations 3 and 4."""
    centred = x_BTD - x_BTD.sum(axis=-1, keepdims=True) / x_BTD.shape[-1]
    variance = (centred**2).sum(axis=-1, keepdims=True) / x_BTD.shape[-1]
    return centred / np.sqrt(variance + config["eps"]) * weights["weight"] + weights.get("bias", 0.0)
