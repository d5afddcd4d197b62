"""ALiBi: each head likes near keys better, by a slope of its own."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ulm.components.contracts import ModelDims
from ulm.registry import KindConfig, register


class Config(KindConfig):
    """Nothing to vary."""


@register("position", Config)
class LinearBiasPosition(nn.Module):
    """score - slope_h * distance, slopes falling geometrically: arXiv 2108.12409, section 3."""

    has_bias = True
    is_of_model = False
    slopes_H: Tensor

    def __init__(self, config: Config, dims: ModelDims) -> None:
        super().__init__()
        self.register_buffer("slopes_H", torch.tensor(slopes(dims.num_heads)), persistent=False)

    def embed(self, x_BTD: Tensor, positions_BT: Tensor) -> Tensor:
        """x as it is."""
        return x_BTD

    def rotate(self, x_BTHE: Tensor, positions_BT: Tensor) -> Tensor:
        """x as it is."""
        return x_BTHE

    def bias(self, positions_BT: Tensor, positions_BS: Tensor) -> Tensor | None:
        """-slope * |query - key|, as bias_BHTS. Keys that come later are the mask's matter."""
        distance_BTS = (positions_BT[:, :, None] - positions_BS[:, None, :]).abs()
        return -self.slopes_H[:, None, None] * distance_BTS[:, None]


def slopes(num_heads: int) -> list[float]:
    """2^(-8/n), 2^(-16/n), … for n heads, a power of two.

    For another number those of the next smaller power of two, then every other one of twice as many: section 3 and
    the paper's own code.
    """
    whole = 2 ** math.floor(math.log2(num_heads))
    series = [2.0 ** (-8 * (i + 1) / whole) for i in range(whole)]
    between = [2.0 ** (-4 * (i + 1) / whole) for i in range(0, 2 * (num_heads - whole), 2)]
    return series + between
