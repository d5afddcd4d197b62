"""What all schedules begin with: a straight line up to the peak."""

from __future__ import annotations

from pydantic import Field

from ulm.registry import KindConfig


class WarmUpConfig(KindConfig):
    """The length of the warm-up (arXiv 1706.02677, section 2.2)."""

    warmup_steps: int | None = Field(None, ge=0)  # None: 2 % of the steps, 10 to 1,000

    def warmup(self, num_steps: int) -> int:
        """Steps of the warm-up of a run of `num_steps`; the last of them has the peak rate."""
        wanted = self.warmup_steps if self.warmup_steps is not None else min(1000, max(10, num_steps // 50))
        return min(wanted, num_steps)
