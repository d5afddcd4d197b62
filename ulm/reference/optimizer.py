"""Optimizer steps by the book: from parameters, gradients and state to new parameters and state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class State:
    """Steps done and running moments, by parameter."""

    num_steps: int = 0
    moments: Mapping[str, tuple[NDArray[Any], NDArray[Any]]] = field(default_factory=dict)


def adamw(
    parameters: Arrays, gradients: Arrays, state: State, config: Mapping[str, Any], lr: float
) -> tuple[dict[str, NDArray[Any]], State]:
    """One step of arXiv 1711.05101, algorithm 2. Matrices decay, vectors (norms) don't.

    As in every implementation in use, `lr` scales the decay too: eta_t = lr and lambda = weight_decay, alpha = 1.
    """
    t, beta1, beta2 = state.num_steps + 1, config["beta1"], config["beta2"]
    moved, moments = {}, {}
    for name, theta in parameters.items():
        gradient = gradients[name]
        zero = np.zeros_like(theta)
        first, second = state.moments.get(name, (zero, zero))
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient**2
        unbiased_first, unbiased_second = first / (1 - beta1**t), second / (1 - beta2**t)
        decay = config["weight_decay"] if theta.ndim >= 2 else 0.0
        moved[name] = theta - lr * (unbiased_first / (np.sqrt(unbiased_second) + config["eps"]) + decay * theta)
        moments[name] = (first, second)
    return moved, State(t, moments)
