"""Learning-rate schedules by the book: the whole curve at once, as shares of the peak rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


def warmup(config: Mapping[str, Any], num_steps: int) -> NDArray[Any]:
    """Equal steps from above 0 up to 1: arXiv 1706.02677, section 2.2. By default 2 % of the run, 10 to 1,000 steps."""
    length = config["warmup_steps"]
    if length is None:
        length = int(np.clip(np.floor(0.02 * num_steps + 1e-9), 10, 1000))  # 1e-9: 0.02 is a little off in binary
    return np.arange(1, length + 1)[:num_steps] / min(length, num_steps) if length else np.zeros(0)


def cosine(config: Mapping[str, Any], num_steps: int) -> NDArray[Any]:
    """eta_min + (1 - eta_min)(1 + cos(pi T_cur / T_i)) / 2 after the warm-up: arXiv 1608.03983, equation 5."""
    up = warmup(config, num_steps)
    length = num_steps - len(up)  # T_i
    low = config["final_share"]
    return np.concatenate([up, low + 0.5 * (1 - low) * (1 + np.cos(np.pi * np.arange(length) / max(length, 1)))])


def wsd(config: Mapping[str, Any], num_steps: int) -> NDArray[Any]:
    """Warm-up, 1, then a straight line whose last step is the final share: arXiv 2404.06395, section 4.2."""
    up = warmup(config, num_steps)
    length = min(round(config["decay_share"] * num_steps), num_steps - len(up))
    down = np.linspace(config["final_share"], 1.0, length)[::-1]
    return np.concatenate([up, np.ones(num_steps - len(up) - length), down])


def linear(config: Mapping[str, Any], num_steps: int) -> NDArray[Any]:
    """A straight line from 1 to the final share, which the step after the last would have: arXiv 1810.04805, A.2."""
    up = warmup(config, num_steps)
    return np.concatenate([up, np.linspace(1.0, config["final_share"], num_steps - len(up) + 1)[:-1]])


def inverse_sqrt(config: Mapping[str, Any], num_steps: int) -> NDArray[Any]:
    """min(n^-0.5, n w^-1.5) divided by its highest value, w^-0.5: arXiv 1706.03762, equation 3."""
    width = max(1, len(warmup(config, num_steps)))
    n = np.arange(1, num_steps + 1)
    return np.minimum(n**-0.5, n * width**-1.5) * width**0.5
