"""LongRoPE: rotary positions whose pairs of dimensions are each slowed by a factor of their own."""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import Field

from ulm.components.contracts import ModelDims
from ulm.components.position._rotary import Rotary, RotaryConfig, positions
from ulm.errors import ConfigError
from ulm.registry import register

MIN_FACTOR = 1e-3
Factors = tuple[float, ...] | None  # one for each pair of dimensions; None: 1 for all


class Config(RotaryConfig):
    """Factors for contexts up to `original_context_tokens` and for longer ones; the spec's context decides.

    `original_context_tokens` None means the spec's own context, so that the short factors hold.
    """

    short_factors: Factors = None
    long_factors: Factors = None
    original_context_tokens: int | None = Field(None, ge=2, le=2**24)
    keep_first_tokens: int = Field(0, ge=0, le=2**24)  # positions that are turned as by rope, whatever the factors
    # Of queries and keys; None: sqrt(1 + ln(longer) / ln(original)).
    attention_factor: float | None = Field(None, ge=0.01, le=100)

    def check(self, spec: Any) -> None:
        """ConfigError where there are not as many factors as pairs, or one is not positive."""
        super().check(spec)
        pairs = self.num_pairs(spec.head_dim)
        for name in ("short_factors", "long_factors"):
            factors = getattr(self, name)
            if factors is not None and len(factors) != pairs:
                problem = f"{len(factors)} factors, and {pairs} pairs of dimensions turn"
                raise ConfigError(f"position.{name}", problem, "one for each pair")
            if factors is not None and not MIN_FACTOR <= min(factors) <= max(factors) <= 1 / MIN_FACTOR:
                problem = f"{min(factors)} to {max(factors)}"
                remedy = f"from {MIN_FACTOR} to {1 / MIN_FACTOR:g}; 1 leaves a pair as it is"
                raise ConfigError(f"position.{name}", problem, remedy)

    def factors_at(self, context_tokens: int) -> Factors:
        """Those that hold for a model of this context."""
        return self.long_factors if context_tokens > self._original(context_tokens) else self.short_factors

    def length_at(self, context_tokens: int) -> float:
        """What queries and keys of a model of this context are multiplied by."""
        original = self._original(context_tokens)
        longer = max(1.0, context_tokens / original)
        return self.attention_factor or math.sqrt(1 + math.log(longer) / math.log(original))

    def _original(self, context_tokens: int) -> int:
        return self.original_context_tokens or context_tokens


@register("position", Config)
class LongRotaryPosition(Rotary):
    """Pair i turned by n theta^(-2i/E) / factor_i at position n, the first few positions by n theta^(-2i/E).

    arXiv 2402.13753, equation 2. Short and long factors, chosen by the context, and the attention factor
    sqrt(1 + ln(s) / ln(original)), s the context over the original: arXiv 2404.14219, section 2, and its configuration.
    """

    def __init__(self, config: Config, dims: ModelDims) -> None:
        factors = config.factors_at(dims.context_tokens)
        usual_F = torch.tensor(config.frequencies(dims.head_dim), dtype=torch.float64)
        factors_F = torch.ones_like(usual_F) if factors is None else torch.tensor(factors, dtype=torch.float64)
        places_S1 = positions(dims)
        angles_SF = torch.where(
            places_S1 < config.keep_first_tokens, places_S1 * usual_F, places_S1 * usual_F / factors_F
        )
        super().__init__(angles_SF, config.length_at(dims.context_tokens))
