"""Warm-up, hold, linear decay."""

from __future__ import annotations

from pydantic import Field

from ulm.components.schedule._warmup import WarmUpConfig
from ulm.registry import register


class Config(WarmUpConfig):
    """`decay_share` 0 holds the peak to the end, 1 falls from the warm-up on."""

    decay_share: float = Field(0.3, ge=0, le=1)  # of all steps
    final_share: float = Field(0.1, ge=0, le=1)  # of the peak rate


@register("schedule", Config)
class WarmupHoldDecay:
    """Piecewise linear, as in arXiv 2404.06395, section 4."""

    @staticmethod
    def share(config: Config, step: int, num_steps: int) -> float:
        """Rate at `step` (from 0) of `num_steps`, as a share of the peak."""
        warmup = config.warmup(num_steps)
        if step < warmup:
            return (step + 1) / warmup
        decay = min(round(config.decay_share * num_steps), num_steps - warmup)
        left = num_steps - step
        return 1.0 if left > decay else config.final_share + (1 - config.final_share) * (left - 1) / max(1, decay - 1)
