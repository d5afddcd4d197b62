"""Warm-up, then down with one over the root of the step."""

from __future__ import annotations

import math

from ulm.components.schedule._warmup import WarmUpConfig
from ulm.registry import register


class Config(WarmUpConfig):
    """The rate needs no length: a run that goes on longer goes on as if it had been planned so."""


@register("schedule", Config)
class InverseSqrt:
    """min(n / warmup, sqrt(warmup / n)) at the n-th step: arXiv 1706.03762, equation 3, as a share of its peak."""

    @staticmethod
    def share(config: Config, step: int, num_steps: int) -> float:
        """Rate at `step` (from 0) of `num_steps`, as a share of the peak."""
        warmup = max(1, config.warmup(num_steps))
        return min((step + 1) / warmup, math.sqrt(warmup / (step + 1)))
