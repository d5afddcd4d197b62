"""Positions as sums of waves, added to the token's vector."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from ulm.components.contracts import ModelDims
from ulm.registry import KindConfig, register


class Config(KindConfig):
    """`theta` is the longest wave's length over 2 pi."""

    theta: float = Field(10_000.0, gt=1, le=1e12)


@register("position", Config)
class SinusoidalPosition(nn.Module):
    """x + (sin(m w_i), cos(m w_i)) side by side, w_i = theta^(-2i/D): arXiv 1706.03762, section 3.5."""

    has_bias = False
    is_of_model = True
    table_SD: Tensor

    def __init__(self, config: Config, dims: ModelDims) -> None:
        super().__init__()
        exponents = torch.arange(0, dims.d_model, 2, dtype=torch.float64) / dims.d_model
        angles = torch.arange(dims.context_tokens + 1, dtype=torch.float64)[:, None] * config.theta**-exponents
        table_SD = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, : dims.d_model]
        self.register_buffer("table_SD", table_SD.float(), persistent=False)

    def embed(self, x_BTD: Tensor, positions_BT: Tensor) -> Tensor:
        """x with the waves at its positions added."""
        return x_BTD + self.table_SD[positions_BT].to(x_BTD.dtype)

    def rotate(self, x_BTHE: Tensor, positions_BT: Tensor) -> Tensor:
        """x as it is."""
        return x_BTHE

    def bias(self, positions_BT: Tensor, positions_BS: Tensor) -> Tensor | None:
        """None: nothing is added to the scores."""
        return None
