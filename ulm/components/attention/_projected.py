"""What the kinds of attention that have heads share: the projections of queries, keys and values."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ulm.components.attend import attend
from ulm.components.cache import KeyValues
from ulm.components.contracts import Mask, ModelDims, Position
from ulm.errors import ConfigError
from ulm.registry import KindConfig


class HeadsConfig(KindConfig):
    """Heads; `head_dim` None means d_model / num_heads."""

    num_heads: int = Field(8, ge=1, le=4096)
    num_kv_heads: int = Field(8, ge=1, le=4096)
    head_dim: int | None = Field(None, ge=1)
    bias: bool = False  # of the four projections
    # RMSNorm of each query and key, before its rotation (arXiv 2302.05442, section 2); whole: of those of all heads at
    # once (arXiv 2501.00656, section 2).
    qk_norm: bool | Literal["whole"] = False
    qk_norm_eps: float = Field(1e-6, gt=0)

    @model_validator(mode="after")
    def _groups(self) -> Self:
        if self.num_heads % self.num_kv_heads:
            problem = f"{self.num_kv_heads} does not divide num_heads, which is {self.num_heads}"
            raise ConfigError("attention.num_kv_heads", problem, "as many, or a divisor")
        return self


class ScoredConfig(HeadsConfig):
    """Heads, and what may be done to their scores."""

    scale: float | None = Field(None, gt=0, le=1e4)  # of the products that scores are; None: 1 / sqrt(head_dim)
    soft_cap: float | None = Field(None, gt=0, le=1e4)  # scores stay within +- soft_cap (arXiv 2408.00118, section 2.3)
    sinks: bool = False  # a learned score per head that takes attention from all tokens (arXiv 2508.10925, 2.1.2)


class HeadNorm(nn.RMSNorm):
    """RMSNorm in the dtype that autocast gives a projection: with a float32 weight torch warns and is slow."""

    def forward(self, x: Tensor) -> Tensor:
        """Scaled, in x's dtype."""
        weight: Tensor = self.weight.to(x.dtype)
        return nn.functional.rms_norm(x, weight.shape, weight, self.eps)


class Projected(nn.Module):
    """Queries of H heads, keys and values of K, and the projection of the heads' outputs.

    What a kind says of itself: the masks it can keep, whether its scores take a bias, whether it reads a source.
    """

    masks: ClassVar[frozenset[str]] = frozenset({"causal", "padding", "document", "prefix"})
    takes_bias: ClassVar[bool] = True
    needs_source: ClassVar[bool] = False

    def __init__(self, config: Any, dims: ModelDims, position: Position, layer: int) -> None:
        super().__init__()
        self.position = position
        self.head_dim, self.num_heads, self.num_kv_heads = dims.head_dim, config.num_heads, config.num_kv_heads
        self.q = nn.Linear(dims.d_model, config.num_heads * dims.head_dim, bias=config.bias)
        self.k = nn.Linear(dims.d_model, config.num_kv_heads * dims.head_dim, bias=config.bias)
        self.v = nn.Linear(dims.d_model, config.num_kv_heads * dims.head_dim, bias=config.bias)
        self.out = nn.Linear(config.num_heads * dims.head_dim, dims.d_model, bias=config.bias)
        self.norms_whole = config.qk_norm == "whole"
        at_once = (config.num_heads, config.num_kv_heads) if self.norms_whole else (1, 1)
        self.q_norm, self.k_norm = (
            HeadNorm(num * dims.head_dim, eps=config.qk_norm_eps) if config.qk_norm else nn.Identity()
            for num in at_once
        )

    def project(
        self, x_BTD: Tensor, positions_BT: Tensor, values_BTJ: Tensor | None, *, turned: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q_BTHE, k_BTKE, v_BTKE; queries and keys turned by their positions, `values_BTJ` added to the values."""
        q_BTJ, k_BTJ, v_BTJ = self.products(x_BTD)
        if self.norms_whole:
            q_BTJ, k_BTJ = self.q_norm(q_BTJ), self.k_norm(k_BTJ)
        q_BTHE, k_BTKE = (x.unflatten(-1, (-1, self.head_dim)) for x in (q_BTJ, k_BTJ))
        if values_BTJ is not None:
            v_BTJ = v_BTJ + values_BTJ
        if not self.norms_whole:
            q_BTHE, k_BTKE = self.q_norm(q_BTHE), self.k_norm(k_BTKE)
        if turned:
            q_BTHE, k_BTKE = (self.position.rotate(x, positions_BT) for x in (q_BTHE, k_BTKE))
        return q_BTHE, k_BTKE, v_BTJ.unflatten(-1, (-1, self.head_dim))

    def products(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as they leave their matrices; an engine that makes one of them puts its own here."""
        return self.q(x_BTD), self.k(x_BTD), self.v(x_BTD)

    def bias(self, positions_BT: Tensor | None, places: Any) -> Tensor | None:
        """What the position kind adds to the scores, as bias_BHTS or None. Without places the queries are the keys."""
        if places is None:
            assert positions_BT is not None
            return self.position.bias(positions_BT, positions_BT)
        return self.position.bias(places.q_positions_BT, places.k_positions_BS)

    def new_state(self, batch: int, max_tokens: int, like: Tensor) -> Any:
        """An empty state of B rows for decoding."""
        return KeyValues.empty(batch, max_tokens, self.num_kv_heads, self.head_dim, like)

    def attend_flops(self, context_tokens: int) -> float:
        """Forward FLOPs per token beside the matrices: scores and values, half of all pairs for causality."""
        return 4.0 * self.num_heads * self.head_dim * context_tokens / 2


class Scored(Projected):
    """What has a score for each query and key: capped, biased by their positions, shared with a sink.

    With a cache, such a kind leaves it to the cache's `attend` to keep keys and values and to look them up.
    """

    window_tokens: int | None = None  # a query sees so many keys, its own included; None: all
    num_sink_tokens: int = 0  # and these first ones of its row

    def __init__(self, config: Any, dims: ModelDims, position: Position, layer: int) -> None:
        super().__init__(config, dims, position, layer)
        self.soft_cap = config.soft_cap
        # Kernels divide by sqrt(E): another scale is the queries'.
        self.q_scale = None if config.scale is None else config.scale * dims.head_dim**0.5
        self.sinks = nn.Parameter(torch.zeros(config.num_heads)) if config.sinks else None

    def project(
        self, x_BTD: Tensor, positions_BT: Tensor, values_BTJ: Tensor | None, *, turned: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As that of all, with queries by which kernels find the scores of this kind's scale."""
        q_BTHE, k_BTKE, v_BTKE = super().project(x_BTD, positions_BT, values_BTJ, turned=turned)
        return (q_BTHE if self.q_scale is None else q_BTHE * self.q_scale), k_BTKE, v_BTKE

    def scored(
        self, q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, mask: Mask, bias_BHTS: Tensor | None = None
    ) -> Tensor:
        """`attend` with what the kind does to its scores, as out_BTHE."""
        return attend(q_BTHE, k_BSKE, v_BSKE, mask, bias_BHTS, soft_cap=self.soft_cap, sinks_H=self.sinks)
