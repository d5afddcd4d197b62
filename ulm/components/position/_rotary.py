"""What the kinds that turn queries and keys share: angles by pair of dimensions, and the turning."""

from __future__ import annotations

from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ulm.components.contracts import ModelDims
from ulm.errors import ConfigError
from ulm.registry import KindConfig

Frequencies = list[float]  # radians per position, of each pair of dimensions


class RotaryConfig(KindConfig):
    """`theta` is the base of the angles' geometric series; `rotary_dim` dimensions are turned, all when None."""

    theta: float = Field(10_000.0, gt=1, le=1e12)
    rotary_dim: int | None = Field(None, ge=2)  # the first of each head (arXiv 2204.06745, section 2.1)

    @model_validator(mode="after")
    def _pairs(self) -> Self:
        if self.rotary_dim is not None and self.rotary_dim % 2:
            raise ConfigError(
                "position.rotary_dim", f"{self.rotary_dim} is odd, and dimensions turn in pairs", "an even number"
            )
        return self

    def check(self, spec: Any) -> None:
        """ConfigError where more dimensions would turn than a head has."""
        if self.rotary_dim is not None and self.rotary_dim > spec.head_dim:
            problem = f"{self.rotary_dim} dimensions, and a head has {spec.head_dim}"
            raise ConfigError("position.rotary_dim", problem, f"at most {spec.head_dim}, or leave it out")

    def num_pairs(self, head_dim: int) -> int:
        """Pairs of dimensions that turn."""
        return (self.rotary_dim or head_dim) // 2

    def frequencies(self, head_dim: int) -> Frequencies:
        """theta^(-2i/E) of pair i: arXiv 2104.09864, equation 15."""
        width = 2 * self.num_pairs(head_dim)
        return [self.theta ** (-2 * i / width) for i in range(width // 2)]


class Rotary(nn.Module):
    """x_i, x_{i+E/2} turned by an angle of its position: arXiv 2104.09864, equation 34, halves paired as in Llama."""

    has_bias = False
    is_of_model = False
    cos_SE: Tensor
    sin_SE: Tensor

    def __init__(self, angles_SF: Tensor, factor: float = 1.0) -> None:
        """From the angles of all positions, in float64; `factor` lengthens what is turned, and sharpens scores."""
        super().__init__()
        # float64 angles: at float32 the table already differs in the last bits at position 1,000
        cos_SF, sin_SF = angles_SF.cos() * factor, angles_SF.sin() * factor
        self.register_buffer("cos_SE", torch.cat([cos_SF, cos_SF], dim=-1).float(), persistent=False)
        self.register_buffer("sin_SE", torch.cat([-sin_SF, sin_SF], dim=-1).float(), persistent=False)

    def embed(self, x_BTD: Tensor, positions_BT: Tensor) -> Tensor:
        """x as it is."""
        return x_BTD

    def rotate(self, x_BTHE: Tensor, positions_BT: Tensor) -> Tensor:
        """x turned by its positions, in x's dtype; dimensions beyond the table's are left as they are."""
        width = self.cos_SE.shape[1]
        if width < x_BTHE.shape[-1]:
            return torch.cat([self.rotate(x_BTHE[..., :width], positions_BT), x_BTHE[..., width:]], dim=-1)
        cos = self.cos_SE[positions_BT][:, :, None].to(x_BTHE.dtype)
        sin = self.sin_SE[positions_BT][:, :, None].to(x_BTHE.dtype)
        first, second = x_BTHE.chunk(2, dim=-1)
        # the minus of the rotation stands in the table: a third faster, forward and backward, than negating here
        return torch.addcmul(x_BTHE * cos, torch.cat([second, first], dim=-1), sin)

    def bias(self, positions_BT: Tensor, positions_BS: Tensor) -> Tensor | None:
        """None: rotation is all."""
        return None


def positions(dims: ModelDims) -> Tensor:
    """Those of the context, and one more for padding, as a column in float64."""
    return torch.arange(dims.context_tokens + 1, dtype=torch.float64)[:, None]
