"""Rotary positions: queries and keys are turned by angles that grow with their position."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ulm.components.contracts import ModelDims
from ulm.registry import KindConfig, register


class Config(KindConfig):
    """`theta` is the base of the angles' geometric series."""

    theta: float = 10_000.0


@register("position", Config)
class RotaryPosition(nn.Module):
    """x_i, x_{i+E/2} turned by position * theta^(-2i/E): arXiv 2104.09864, equation 34, halves paired as in Llama."""

    cos_SE: Tensor
    sin_SE: Tensor

    def __init__(self, config: Config, dims: ModelDims) -> None:
        super().__init__()
        exponents = torch.arange(0, dims.head_dim, 2, dtype=torch.float64) / dims.head_dim
        angles = torch.arange(dims.context_tokens + 1, dtype=torch.float64)[:, None] * config.theta**-exponents
        # float64 angles: at float32 the table already differs in the last bits at position 1,000
        self.register_buffer("cos_SE", torch.cat([angles.cos(), angles.cos()], dim=-1).float(), persistent=False)
        self.register_buffer("sin_SE", torch.cat([-angles.sin(), angles.sin()], dim=-1).float(), persistent=False)

    def embed(self, x_BTD: Tensor, positions_BT: Tensor) -> Tensor:
        """x as it is."""
        return x_BTD

    def rotate(self, x_BTHE: Tensor, positions_BT: Tensor) -> Tensor:
        """x turned by its positions, in x's dtype."""
        cos = self.cos_SE[positions_BT][:, :, None].to(x_BTHE.dtype)
        sin = self.sin_SE[positions_BT][:, :, None].to(x_BTHE.dtype)
        first, second = x_BTHE.chunk(2, dim=-1)
        # the minus of the rotation stands in the table: a third faster, forward and backward, than negating here
        return torch.addcmul(x_BTHE * cos, torch.cat([second, first], dim=-1), sin)

    def bias(self, positions_BT: Tensor, positions_BS: Tensor) -> Tensor | None:
        """None: rotation is all."""
        return None
