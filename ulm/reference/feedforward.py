"""Feed-forward layers by the book."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


def swiglu(x_BTD: NDArray[Any], weights: Mapping[str, NDArray[Any]], config: Mapping[str, Any]) -> NDArray[Any]:
    """(Swish_1(x W) * x V) W_2 with Swish_1(z) = z / (1 + exp(-z)): arXiv 2002.05202, equation 6."""
    gate = x_BTD @ weights["gate.weight"].T
    swish = gate / (1 + np.exp(-gate))
    return (swish * (x_BTD @ weights["up.weight"].T)) @ weights["out.weight"].T
