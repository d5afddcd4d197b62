"""GELU: hidden units weighted by how likely a normal variable is below them."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import gelu

from ulm.components.contracts import ModelDims
from ulm.registry import KindConfig, register


class Config(KindConfig):
    """`d_hidden` None means 4 d_model."""

    d_hidden: int | None = Field(None, ge=1, le=2**20)
    bias: bool = False  # of both projections
    approximate: bool = False  # by tanh, as GPT-2 and Bloom compute it


@register("feedforward", Config)
class GELUFeedForward(nn.Module):
    """GELU(x W_up) W_out with GELU(z) = z Phi(z): arXiv 1606.08415, section 2; its tanh form too."""

    def __init__(self, config: Config, dims: ModelDims, layer: int) -> None:
        super().__init__()
        d_hidden = config.d_hidden or 4 * dims.d_model
        self.up = nn.Linear(dims.d_model, d_hidden, bias=config.bias)
        self.out = nn.Linear(d_hidden, dims.d_model, bias=config.bias)
        self.approximate = "tanh" if config.approximate else "none"

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Each token on its own, as out_BTD."""
        return self.out(gelu(self.up(x_BTD), approximate=self.approximate))
