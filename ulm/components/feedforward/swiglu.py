"""SwiGLU: a feed-forward layer whose hidden units are gated by a second projection."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import silu

from ulm.components.contracts import ModelDims
from ulm.registry import KindConfig, register


class Config(KindConfig):
    """`d_hidden` None means 8/3 d_model, rounded up to a multiple of 32."""

    d_hidden: int | None = Field(None, ge=1, le=2**20)


@register("feedforward", Config)
class SwiGLU(nn.Module):
    """(silu(x W_gate) * x W_up) W_down: arXiv 2002.05202, equation 6."""

    def __init__(self, config: Config, dims: ModelDims, layer: int) -> None:
        super().__init__()
        d_hidden = config.d_hidden or -(-8 * dims.d_model // (3 * 32)) * 32
        self.gate = nn.Linear(dims.d_model, d_hidden, bias=False)
        self.up = nn.Linear(dims.d_model, d_hidden, bias=False)
        self.out = nn.Linear(d_hidden, dims.d_model, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Each token on its own, as out_BTD."""
        return self.out(self.gated(x_BTD))

    def gated(self, x_BTD: Tensor) -> Tensor:
        """The hidden units; an engine that makes one matrix of both puts its own here."""
        return silu(self.gate(x_BTD)) * self.up(x_BTD)
