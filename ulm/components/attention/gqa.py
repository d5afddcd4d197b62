"""Grouped-query attention: H query heads share K key/value heads. K = H is multi-head, K = 1 multi-query."""

from __future__ import annotations

from torch import Tensor

from ulm.components.attention._projected import Scored, ScoredConfig
from ulm.components.cache import PastKeyValues
from ulm.components.contracts import Mask
from ulm.registry import register


class Config(ScoredConfig):
    """Heads, and what may be done to their scores."""


@register("attention", Config)
class GroupedQueryAttention(Scored):
    """softmax(q k^T / sqrt(E)) v over H heads in K groups: arXiv 2305.13245."""

    def forward(
        self,
        x_BTD: Tensor,
        *,
        positions_BT: Tensor,
        mask: Mask,
        cache: PastKeyValues | None = None,
        values_BTJ: Tensor | None = None,
    ) -> Tensor:
        """Mix tokens, as out_BTD. With a cache, it takes in the T new keys and values, and finds what queries may see.

        `values_BTJ`, J = K E, is added to the values.
        """
        q_BTHE, k_BTKE, v_BTKE = self.project(x_BTD, positions_BT, values_BTJ)
        if cache is not None:
            out_BTHE = cache.attend(self, q_BTHE, k_BTKE, v_BTKE, mask)
        else:
            out_BTHE = self.scored(q_BTHE, k_BTKE, v_BTKE, mask, self.bias(positions_BT, mask.places))
        return self.out(out_BTHE.flatten(-2))
