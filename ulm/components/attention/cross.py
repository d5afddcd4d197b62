"""Cross-attention: the tokens of one text look at another, whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ulm.components.attend import attend
from ulm.components.attention._projected import HeadsConfig, Projected
from ulm.components.contracts import PADDING, Mask, ModelDims, Places, Position
from ulm.components.mask.padding import PaddingMask
from ulm.registry import configure, register


class Config(HeadsConfig):
    """Heads, and what may be done to their scores."""

    soft_cap: float | None = Field(None, gt=0, le=1e4)  # scores stay within +- soft_cap (arXiv 2408.00118, section 2.3)
    sinks: bool = False  # a learned score per head that takes attention from all tokens (arXiv 2508.10925, 2.1.2)


@dataclass
class Source:
    """A text as its readers see it: keys, values, and which of its places hold a token (PADDING: none)."""

    k_BSKE: Tensor
    v_BSKE: Tensor
    segments_BS: Tensor

    def can_forget(self, length: int) -> bool:
        """Always: it does not grow with the text that reads it."""
        return True


@register("attention", Config)
class CrossAttention(Projected):
    """softmax(q k^T / sqrt(E)) v, queries from x, keys and values from a source: arXiv 1706.03762, section 3.2.3.

    `read` makes the keys and values of a source once, for all calls and all steps of decoding. Positions do not enter:
    those of two texts have no distance. Not causal: it sees the whole source, and nothing of x but each token itself.
    """

    masks = frozenset({"padding"})
    takes_bias = False
    needs_source = True

    def __init__(self, config: Config, dims: ModelDims, position: Position, layer: int) -> None:
        super().__init__(config, dims, position, layer)
        self.soft_cap = config.soft_cap
        self.sinks = nn.Parameter(torch.zeros(config.num_heads)) if config.sinks else None

    def read(self, source_BSD: Tensor, is_source_BS: Tensor | None = None) -> Source:
        """The source's keys and values; `is_source_BS` says which of its places hold a token (None: all)."""
        if is_source_BS is None:
            is_source_BS = torch.ones(source_BSD.shape[:2], dtype=torch.bool, device=source_BSD.device)
        k_BSKE = self.k_norm(self.k(source_BSD).unflatten(-1, (-1, self.head_dim)))
        v_BSKE = self.v(source_BSD).unflatten(-1, (-1, self.head_dim))
        return Source(k_BSKE, v_BSKE, torch.where(is_source_BS, 0, PADDING))

    def forward(self, x_BTD: Tensor, *, source: Source, **_: Any) -> Tensor:
        """What each token finds in the source, as out_BTD; positions, mask and cache of x do not matter."""
        q_BTHE = self.q_norm(self.q(x_BTD).unflatten(-1, (-1, self.head_dim)))
        positions_BT, positions_BS = torch.zeros_like(x_BTD[..., 0], dtype=torch.long), source.segments_BS
        places = Places(positions_BT, positions_BS, positions_BT, source.segments_BS)
        mask = Mask((_PADDING,), places)
        out_BTHE = attend(q_BTHE, source.k_BSKE, source.v_BSKE, mask, soft_cap=self.soft_cap, sinks_H=self.sinks)
        return self.out(out_BTHE.flatten(-2))

    def attend_flops(self, context_tokens: int) -> float:
        """Forward FLOPs per token beside the matrices, of a source of `context_tokens`: scores and values of all."""
        return 4.0 * self.num_heads * self.head_dim * context_tokens


_PADDING = PaddingMask(configure("mask", "padding"))  # type: ignore[arg-type]
