"""Output heads by the book."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


def logits(
    x_BTD: NDArray[Any], weights: Mapping[str, NDArray[Any]], config: Mapping[str, Any], *, vocab_size: int
) -> NDArray[Any]:
    """logits_BTV = x W^T over the true vocabulary: arXiv 1608.05859, section 2 (there h_3 = V h_2)."""
    return x_BTD @ weights["weight"][:vocab_size].T


def soft_cap(
    x_BTD: NDArray[Any], weights: Mapping[str, NDArray[Any]], config: Mapping[str, Any], *, vocab_size: int
) -> NDArray[Any]:
    """cap tanh(logits / cap): arXiv 2408.00118, section 2.3."""
    return config["cap"] * np.tanh(logits(x_BTD, weights, config, vocab_size=vocab_size) / config["cap"])
