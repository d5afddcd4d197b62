"""When a step is too bad to go on from: a loss or gradient that is not finite, or that leaps."""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any

from ulm.recipes.train import Guard

WINDOW = 32  # steps whose medians stand for what is usual
ENOUGH = 16  # of them, before a leap can be told from a beginning


class Tripped(Exception):  # noqa: N818  an event, not an error: training goes on
    """A step after which training goes back to a checkpoint. Every rank raises it at the same step."""

    def __init__(self, step: int, why: str) -> None:
        super().__init__(why)
        self.step = step


@dataclass
class Rollbacks:
    """How often a run has gone back to a checkpoint, how far the last time, and what is left of its rate."""

    times: int = 0
    checkpoints: int = 0  # that it went back by: 1 is to the newest
    last_step: int | None = None  # that tripped
    lr_scale: float = 1.0

    def trip(self, step: int, lr_factor: float) -> None:
        """Count one more: one checkpoint further back when the stretch of steps that tripped last does so again."""
        again = self.last_step is not None and step <= self.last_step + WINDOW
        self.times, self.checkpoints = self.times + 1, self.checkpoints + 1 if again else 1
        self.last_step, self.lr_scale = step, self.lr_scale * lr_factor


class Watch:
    """The last steps of a run, and the judgement of the next."""

    def __init__(self, config: Guard) -> None:
        self._config = config
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._norms: deque[float] = deque(maxlen=WINDOW)

    def see(self, step: int, loss: float, grad_norm: float) -> None:
        """Take note of a step; raises Tripped where it is not finite or above its limits."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise Tripped(step, f"loss {loss}, gradient norm {grad_norm}: not finite")
        if len(self._losses) >= ENOUGH:
            usual_loss, usual_norm = statistics.median(self._losses), statistics.median(self._norms)
            rise, ratio = self._config.loss_rise, self._config.grad_norm_ratio
            if rise is not None and loss > usual_loss + rise:
                raise Tripped(step, f"loss {loss:.3f} is more than {rise:g} nats above the usual {usual_loss:.3f}")
            if ratio is not None and usual_norm > 0 and grad_norm > ratio * usual_norm:
                problem = f"gradient norm {grad_norm:.3g} is more than {ratio:g} times the usual {usual_norm:.3g}"
                raise Tripped(step, problem)
        self._losses.append(loss)
        self._norms.append(grad_norm)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"losses": list(self._losses), "grad_norms": list(self._norms)}

    def restore(self, state: dict[str, Any]) -> None:
        """As a checkpoint has it."""
        self._losses.extend(state["losses"])
        self._norms.extend(state["grad_norms"])
