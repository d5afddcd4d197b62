"""How positions enter queries and keys, by the book."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


def rope(x_BTHE: NDArray[Any], positions_BT: NDArray[Any], config: Mapping[str, Any]) -> NDArray[Any]:
    """Pair i as a complex number, times exp(j m theta^(-2i/E)) at position m: arXiv 2104.09864, equations 12 and 15.

    Pair i is (x_i, x_(i+E/2)), as Llama stores it; the paper pairs neighbours. A permutation of E is the difference.
    """
    width = x_BTHE.shape[-1]
    pairs = x_BTHE[..., : width // 2] + 1j * x_BTHE[..., width // 2 :]
    frequencies = np.array([config["theta"] ** (-2 * i / width) for i in range(width // 2)])
    turned = pairs * np.exp(1j * positions_BT[:, :, None, None] * frequencies)
    return np.concatenate([turned.real, turned.imag], axis=-1)
