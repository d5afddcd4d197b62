"""Optimizer steps by the book: from parameters, gradients and state to new parameters and state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

TABLES = ("embedding.", "position.", "head.")  # matrices that look up or classify: Muon leaves them to AdamW
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


def muon(
    parameters: Arrays, gradients: Arrays, state: State, config: Mapping[str, Any], lr: float
) -> tuple[dict[str, NDArray[Any]], State]:
    """One step of https://kellerjordan.github.io/posts/muon/ for the matrices of layers, of `adamw` for the rest.

    `lr` is the matrices' rate now; AdamW's own rate, where it has one, falls with it.
    """
    hidden = [name for name, theta in parameters.items() if theta.ndim == 2 and not name.startswith(TABLES)]
    adamw_lr = lr if config["adamw_lr"] is None else lr * config["adamw_lr"] / config["lr"]
    others = {name: theta for name, theta in parameters.items() if name not in hidden}
    moved, after = adamw(others, gradients, state, config, adamw_lr)
    moments, mu = dict(after.moments), config["momentum"]
    for name in hidden:
        theta, zero = parameters[name], np.zeros_like(parameters[name])
        momentum = mu * state.moments.get(name, (zero, zero))[0] + (1 - mu) * gradients[name]
        direction = newton_schulz(mu * momentum + (1 - mu) * gradients[name], config["num_iterations"])
        rows, columns = theta.shape
        original = max(1.0, rows / columns) ** 0.5
        factor = original if config["scale"] == "original" else 0.2 * max(rows, columns) ** 0.5  # arXiv 2502.16982
        moved[name] = theta - lr * (factor * direction + config["weight_decay"] * theta)
        moments[name] = (momentum, zero)
    return {name: moved[name] for name in parameters}, State(after.num_steps, moments)


def newton_schulz(x: NDArray[Any], num_iterations: int) -> NDArray[Any]:
    """x / |x| after so many times a x + b x x^T x + c (x x^T)^2 x, from its singular values, which alone change."""
    left, values, right = np.linalg.svd(x, full_matrices=False)
    values = values / max(float(np.sqrt((values**2).sum())), 1e-7)
    for _ in range(num_iterations):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    product: NDArray[Any] = (left * values) @ right
    return product


def lion(
    parameters: Arrays, gradients: Arrays, state: State, config: Mapping[str, Any], lr: float
) -> tuple[dict[str, NDArray[Any]], State]:
    """One step of arXiv 2302.06675, algorithm 2. Matrices decay, vectors don't."""
    moved, moments = {}, {}
    for name, theta in parameters.items():
        gradient, zero = gradients[name], np.zeros_like(theta)
        momentum = state.moments.get(name, (zero, zero))[0]
        direction = np.sign(config["beta1"] * momentum + (1 - config["beta1"]) * gradient)
        decay = config["weight_decay"] if theta.ndim >= 2 else 0.0
        moved[name] = theta - lr * (direction + decay * theta)
        moments[name] = (config["beta2"] * momentum + (1 - config["beta2"]) * gradient, zero)
    return moved, State(state.num_steps + 1, moments)
