"""LayerNorm: centre a vector and scale it to unit variance."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor, nn

from ulm.components.contracts import ModelDims
from ulm.registry import KindConfig, register


class Config(KindConfig):
    """`eps` keeps a constant vector finite; `bias`: a learned shift beside the learned scale."""

    eps: float = Field(1e-5, gt=0)
    bias: bool = True


@register("norm", Config)
class LayerNorm(nn.LayerNorm):
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias, over D: arXiv 1607.06450, equation 4. In x's dtype."""

    def __init__(self, config: Config, dims: ModelDims) -> None:
        super().__init__(dims.d_model, eps=config.eps, bias=config.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Centred and scaled, in x's dtype."""
        return super().forward(x_BTD)
