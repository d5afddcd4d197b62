"""Output heads by the book."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray


def logits(
    x_BTD: NDArray[Any], weights: Mapping[str, NDArray[Any]], config: Mapping[str, Any], *, vocab_size: int
) -> NDArray[Any]:
    """logits_BTV = x W^T over the true vocabulary: arXiv 1608.05859, section 2 (there h_3 = V h_2)."""
    return x_BTD @ weights["weight"][:vocab_size].T
