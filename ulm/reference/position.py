"""How positions enter embeddings, or queries and keys, by the book."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def _unchanged(x: Array, positions_BT: Array) -> Array:
    return x


@dataclass(frozen=True)
class Position:
    """What positions do to token embeddings (x_BTD), and to queries and keys (x_BTHE)."""

    embed: Callable[[Array, Array], Array] = _unchanged
    rotate: Callable[[Array, Array], Array] = _unchanged


def rope(weights: Mapping[str, Array], config: Mapping[str, Any]) -> Position:
    """Pair i as a complex number, times exp(j m theta^(-2i/E)) at position m: arXiv 2104.09864, equations 12 and 15.

    Pair i is (x_i, x_(i+E/2)), as Llama stores it; the paper pairs neighbours. A permutation of E is the difference.
    """

    def rotate(x_BTHE: Array, positions_BT: Array) -> Array:
        width = x_BTHE.shape[-1]
        pairs = x_BTHE[..., : width // 2] + 1j * x_BTHE[..., width // 2 :]
        frequencies = np.array([config["theta"] ** (-2 * i / width) for i in range(width // 2)])
        turned = pairs * np.exp(1j * positions_BT[:, :, None, None] * frequencies)
        return np.concatenate([turned.real, turned.imag], axis=-1)

    return Position(rotate=rotate)


def learned(weights: Mapping[str, Array], config: Mapping[str, Any]) -> Position:
    """The vector of position m added to a token's: the sum of arXiv 1706.03762, section 3.5, with a table."""

    def embed(x_BTD: Array, positions_BT: Array) -> Array:
        rows = [[weights["weight"][m] for m in row] for row in positions_BT]
        return x_BTD + np.array(rows)

    return Position(embed=embed)
