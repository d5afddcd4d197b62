"""Grouped-query attention: H query heads share K key/value heads. K = H is multi-head, K = 1 multi-query."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from ulm.components.attend import attend
from ulm.components.attention._projected import HeadsConfig, Projected
from ulm.components.cache import KeyValues
from ulm.components.contracts import Mask, ModelDims, Position
from ulm.registry import register


class Config(HeadsConfig):
    """Heads, and what may be done to their scores."""

    soft_cap: float | None = Field(None, gt=0, le=1e4)  # scores stay within +- soft_cap (arXiv 2408.00118, section 2.3)
    sinks: bool = False  # a learned score per head that takes attention from all tokens (arXiv 2508.10925, 2.1.2)


@register("attention", Config)
class GroupedQueryAttention(Projected):
    """softmax(q k^T / sqrt(E)) v over H heads in K groups: arXiv 2305.13245."""

    def __init__(self, config: Config, dims: ModelDims, position: Position, layer: int) -> None:
        super().__init__(config, dims, position, layer)
        self.soft_cap = config.soft_cap
        self.sinks = nn.Parameter(torch.zeros(config.num_heads)) if config.sinks else None

    def forward(
        self,
        x_BTD: Tensor,
        *,
        positions_BT: Tensor,
        mask: Mask,
        cache: KeyValues | None = None,
        values_BTJ: Tensor | None = None,
    ) -> Tensor:
        """Mix tokens, as out_BTD. With a cache, appends the T new keys and values and reads what the mask's places say.

        `values_BTJ`, J = K E, is added to the values.
        """
        q_BTHE, k_BSKE, v_BSKE = self.project(x_BTD, positions_BT, values_BTJ)
        if cache is not None:
            assert mask.places is not None
            k_BSKE, v_BSKE = cache.append(k_BSKE, v_BSKE, mask.places)
        bias_BHTS = self.bias(positions_BT, mask.places)
        out_BTHE = attend(q_BTHE, k_BSKE, v_BSKE, mask, bias_BHTS, soft_cap=self.soft_cap, sinks_H=self.sinks)
        return self.out(out_BTHE.flatten(-2))
