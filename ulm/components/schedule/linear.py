"""Warm-up, then a straight line down to a share of the peak."""

from __future__ import annotations

from pydantic import Field

from ulm.components.schedule._warmup import WarmUpConfig
from ulm.registry import register


class Config(WarmUpConfig):
    """Shares are of all steps (warm-up) and of the peak rate (final)."""

    final_share: float = Field(0.1, ge=0, le=1)


@register("schedule", Config)
class Linear:
    """1 - (1 - final) t after the warm-up: arXiv 1810.04805, appendix A.2, with final 0."""

    @staticmethod
    def share(config: Config, step: int, num_steps: int) -> float:
        """Rate at `step` (from 0) of `num_steps`, as a share of the peak."""
        warmup = config.warmup(num_steps)
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, num_steps - warmup)
        return 1.0 - (1 - config.final_share) * done
