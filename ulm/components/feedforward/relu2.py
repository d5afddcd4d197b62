"""Squared ReLU: sparse hidden units that grow quadratically."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import relu

from ulm.components.contracts import ModelDims
from ulm.registry import KindConfig, register


class Config(KindConfig):
    """`d_hidden` None means 4 d_model."""

    d_hidden: int | None = Field(None, ge=1, le=2**20)
    bias: bool = False  # of both projections


@register("feedforward", Config)
class SquaredReLUFeedForward(nn.Module):
    """max(0, x W_up)^2 W_out: arXiv 2109.08668, section 3.1."""

    def __init__(self, config: Config, dims: ModelDims, layer: int) -> None:
        super().__init__()
        d_hidden = config.d_hidden or 4 * dims.d_model
        self.up = nn.Linear(dims.d_model, d_hidden, bias=config.bias)
        self.out = nn.Linear(d_hidden, dims.d_model, bias=config.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Each token on its own, as out_BTD."""
        return self.out(relu(self.up(x_BTD)).square())
