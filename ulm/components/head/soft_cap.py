"""Scores of the vocabulary that stay within a bound."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from ulm.components.contracts import ModelDims
from ulm.components.head.logits import LogitsHead
from ulm.registry import KindConfig, register


class Config(KindConfig):
    """`cap`: no logit is above it, nor below its negative."""

    cap: float = Field(30.0, gt=0, le=1e4)


@register("head", Config)
class SoftCapHead(LogitsHead):
    """cap * tanh(x W^T / cap): arXiv 2408.00118, section 2.3."""

    def __init__(self, config: Config, dims: ModelDims, tied: torch.nn.Parameter | None) -> None:
        super().__init__(config, dims, tied)
        self.cap = config.cap

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Scores, as logits_BTV."""
        return self.cap * torch.tanh(self.project(x_BTD) / self.cap)
