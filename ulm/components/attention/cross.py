"""Cross-attention: the tokens of one text look at another, whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ulm.components.attention._projected import Scored, ScoredConfig
from ulm.components.contracts import PADDING, Mask, Places
from ulm.components.mask.padding import PADDING_MASK
from ulm.registry import register


class Config(ScoredConfig):
    """Heads, and what may be done to their scores."""


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
class CrossAttention(Scored):
    """softmax(q k^T / sqrt(E)) v, queries from x, keys and values from a source: arXiv 1706.03762, section 3.2.3.

    `read` makes the keys and values of a source once, for all calls and all steps of decoding. Positions do not enter:
    those of two texts have no distance. Not causal: it sees the whole source, and nothing of x but each token itself.
    """

    masks = frozenset({"padding"})
    takes_bias = False
    needs_source = True

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
        mask = Mask((PADDING_MASK,), places)
        out_BTHE = self.scored(q_BTHE, source.k_BSKE, source.v_BSKE, mask)
        return self.out(out_BTHE.flatten(-2))

    def attend_flops(self, context_tokens: int) -> float:
        """Forward FLOPs per token beside the matrices, of a source of `context_tokens`: scores and values of all."""
        return 4.0 * self.num_heads * self.head_dim * context_tokens
