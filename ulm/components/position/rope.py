"""Rotary positions: queries and keys are turned by angles that grow with their position."""

from __future__ import annotations

import math
from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from ulm.components.contracts import ModelDims
from ulm.components.position._rotary import Frequencies, Rotary, RotaryConfig, positions
from ulm.errors import ConfigError
from ulm.registry import register


class Scaling(BaseModel):
    """How a model that was trained on `original_context_tokens` reads `factor` times as many."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Literal["linear", "ntk", "yarn"]
    factor: float = Field(ge=1, le=1e6)
    original_context_tokens: int | None = Field(None, ge=2, le=2**24)  # yarn: what wave lengths are compared with
    slow_turns: float = Field(1.0, gt=0, le=1e6)  # yarn: a pair that turns less often within it is slowed by the factor
    fast_turns: float = Field(32.0, gt=0, le=1e6)  # yarn: one that turns more often stays as it is
    attention_factor: float | None = Field(None, ge=0.01, le=100)  # yarn: of queries and keys; None: 0.1 ln(factor) + 1

    @model_validator(mode="after")
    def _of_its_kind(self) -> Self:
        if self.kind == "yarn" and self.original_context_tokens is None:
            raise ConfigError("position.scaling.original_context_tokens", "is missing", "the context it was trained on")
        if self.slow_turns >= self.fast_turns:
            problem = f"{self.slow_turns:g} is not below fast_turns, which is {self.fast_turns:g}"
            raise ConfigError("position.scaling.slow_turns", problem, "the paper's 1 and 32")
        return self


class Config(RotaryConfig):
    """Frequencies, and how they are scaled to a longer context."""

    scaling: Scaling | None = None


@register("position", Config)
class RotaryPosition(Rotary):
    """Pair i turned by position * theta^(-2i/E): arXiv 2104.09864, equation 34.

    Scaling: linear divides every angle by the factor (arXiv 2306.15595, equation 4); ntk raises theta so that the
    slowest pair is divided by it and the fastest is not (arXiv 2309.00071, section 3.1); yarn divides the slow pairs,
    leaves the fast ones, and sharpens the scores (arXiv 2309.00071, sections 3.2 and 3.3).
    """

    def __init__(self, config: Config, dims: ModelDims) -> None:
        angles_SF = positions(dims) * torch.tensor(scaled(config, dims.head_dim), dtype=torch.float64)
        super().__init__(angles_SF, attention_factor(config.scaling))


def scaled(config: Config, head_dim: int) -> Frequencies:
    """The frequency of each pair."""
    scaling, usual = config.scaling, config.frequencies(head_dim)
    if scaling is None:
        return usual
    width = 2 * len(usual)
    match scaling.kind:
        case "linear":
            return [frequency / scaling.factor for frequency in usual]
        case "ntk":
            theta = config.theta * scaling.factor ** (width / max(width - 2, 1))
            return [theta ** (-2 * i / width) for i in range(width // 2)]
        case "yarn":
            assert scaling.original_context_tokens is not None
            return [_by_turns(frequency, scaling, scaling.original_context_tokens) for frequency in usual]


def _by_turns(frequency: float, scaling: Scaling, original: int) -> float:
    """(1 - g) frequency / factor + g frequency, g rising with the turns that the pair makes in the original context."""
    turns = original * frequency / (2 * math.pi)
    share = (turns - scaling.slow_turns) / (scaling.fast_turns - scaling.slow_turns)
    share = min(1.0, max(0.0, share))
    return (1 - share) * frequency / scaling.factor + share * frequency


def attention_factor(scaling: Scaling | None) -> float:
    """What queries and keys are multiplied by."""
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    return scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1
