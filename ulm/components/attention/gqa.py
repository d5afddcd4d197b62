"""Grouped-query attention: H query heads share K key/value heads. K = H is multi-head, K = 1 multi-query."""

from __future__ import annotations

from torch import Tensor

from ulm.components.attention._projected import Scored, ScoredConfig
from ulm.components.cache import KeyValues
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
        out_BTHE = self.scored(q_BTHE, k_BSKE, v_BSKE, mask, bias_BHTS)
        return self.out(out_BTHE.flatten(-2))
