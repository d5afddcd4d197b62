"""Grouped-query attention: H query heads share K key/value heads. K = H is multi-head, K = 1 multi-query."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from ulm.components.attend import attend
from ulm.components.cache import LayerCache
from ulm.components.contracts import Mask, ModelDims, Position
from ulm.registry import KindConfig, register


class Config(KindConfig):
    """Heads; `head_dim` None means d_model / num_heads."""

    num_heads: int = Field(8, ge=1)
    num_kv_heads: int = Field(8, ge=1)
    head_dim: int | None = None

    @model_validator(mode="after")
    def _groups(self) -> Self:
        if self.num_heads % self.num_kv_heads:
            raise ValueError("num_heads must be a multiple of num_kv_heads")
        return self


@register("attention", Config)
class GroupedQueryAttention(nn.Module):
    """softmax(q k^T / sqrt(E)) v over H heads in K groups: arXiv 2305.13245."""

    def __init__(self, config: Config, dims: ModelDims, position: Position, layer: int) -> None:
        super().__init__()
        self.position = position
        self.q = nn.Linear(dims.d_model, config.num_heads * dims.head_dim, bias=False)
        self.k = nn.Linear(dims.d_model, config.num_kv_heads * dims.head_dim, bias=False)
        self.v = nn.Linear(dims.d_model, config.num_kv_heads * dims.head_dim, bias=False)
        self.out = nn.Linear(config.num_heads * dims.head_dim, dims.d_model, bias=False)
        self.head_dim = dims.head_dim

    def forward(
        self, x_BTD: Tensor, *, positions_BT: Tensor, mask: Mask, cache: LayerCache | None = None, num_known: int = 0
    ) -> Tensor:
        """Mix tokens, as out_BTD. With a cache, appends the T new keys and values and reads `num_known` slots."""
        q_BTHE = self.position.rotate(self.q(x_BTD).unflatten(-1, (-1, self.head_dim)), positions_BT)
        k_BSKE = self.position.rotate(self.k(x_BTD).unflatten(-1, (-1, self.head_dim)), positions_BT)
        v_BSKE = self.v(x_BTD).unflatten(-1, (-1, self.head_dim))
        if cache is not None:
            k_BSKE, v_BSKE = cache.append(k_BSKE, v_BSKE, positions_BT, num_known)
        return self.out(attend(q_BTHE, k_BSKE, v_BSKE, mask).flatten(-2))
