"""RMSNorm: scale a vector to unit root mean square."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from ulm.components.contracts import ModelDims
from ulm.registry import KindConfig, register


class Config(KindConfig):
    """`eps` keeps a zero vector finite."""

    eps: float = Field(1e-6, gt=0)


@register("norm", Config)
class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight: arXiv 1910.07467, equation 4."""

    def __init__(self, config: Config, dims: ModelDims) -> None:
        super().__init__()
        self.eps = config.eps
        self.weight = nn.Parameter(torch.ones(dims.d_model))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Scaled, in x's dtype."""
        return nn.functional.rms_norm(x_BTD, self.weight.shape, self.weight, self.eps)
