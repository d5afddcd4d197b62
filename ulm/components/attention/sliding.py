"""Sliding-window attention: each token sees the few before it, in time and memory that do not grow with the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from ulm.components.attention._projected import Scored, ScoredConfig
from ulm.components.cache import PastKeyValues
from ulm.components.contracts import PADDING, Mask, ModelDims, Pair, Places, Position
from ulm.components.mask.causal import CAUSAL_MASK
from ulm.components.mask.padding import PADDING_MASK
from ulm.registry import register


class Config(ScoredConfig):
    """How far back a token sees, itself included, and what may be done to the scores."""

    window_tokens: int = Field(256, ge=1, le=2**24)
    num_sink_tokens: int = Field(0, ge=0, le=2**24)  # the first of a row, which every token sees too (arXiv 2309.17453)


@dataclass(frozen=True)
class Window:
    """A mask: the key is one of the last `window_tokens`, or one of the first `num_sink_tokens` of its row."""

    window_tokens: int
    num_sink_tokens: int = 0
    is_causal = False  # it says nothing of what comes after

    def allowed(self, pair: Pair) -> Tensor:
        """Where the key is near enough, or a sink."""
        near = pair.q_position - pair.k_position < self.window_tokens
        return near | (pair.k_position < self.num_sink_tokens) if self.num_sink_tokens else near


@dataclass
class RecentKeyValues:
    """Keys and values of a row's first few tokens and of its last window, which go round in a ring.

    Which position a slot holds follows from the row's length. The last slot is a bin for padding: written, never read.
    """

    k_BSKE: Tensor
    v_BSKE: Tensor
    num_sink_tokens: int

    @classmethod
    def empty(cls, batch: int, num_sink_tokens: int, ring_tokens: int, heads: tuple[int, int], like: Tensor) -> Self:
        """In the dtype and on the device of `like`; `heads` are the number of key/value heads and their width."""
        shape = (batch, num_sink_tokens + ring_tokens + 1, *heads)
        return cls(like.new_zeros(shape), like.new_zeros(shape), num_sink_tokens)

    def attend(self, attention: Any, q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, mask: Mask) -> Tensor:
        """What T new queries find within their window, as out_BTHE."""
        assert mask.places is not None
        k_BSKE, v_BSKE, places = self.append(k_BTKE, v_BTKE, mask.places)
        window = Window(attention.window_tokens, attention.num_sink_tokens)
        seen = Mask((*mask.kinds, window, PADDING_MASK), places).dense()
        out_BTHE: Tensor = attention.scored(q_BTHE, k_BSKE, v_BSKE, seen, attention.bias(None, places))
        return out_BTHE

    def append(self, k_BTKE: Tensor, v_BTKE: Tensor, places: Places) -> tuple[Tensor, Tensor, Places]:
        """Take T new tokens in; returns all keys and values that their queries may see, and where those stand."""
        assert places.known_B is not None and places.num_new_B is not None
        known_B1, after_B1 = places.known_B[:, None], (places.known_B + places.num_new_B)[:, None]
        positions_BT = places.q_positions_BT
        is_new_BT = torch.arange(positions_BT.shape[1], device=positions_BT.device) < places.num_new_B[:, None]
        if positions_BT.shape[1] == 1:  # the token that leaves the ring is out of the window already
            self._write(k_BTKE, v_BTKE, positions_BT, is_new_BT)
            held_BS = self._held(after_B1)
            k_BSKE, v_BSKE = self.k_BSKE[:, :-1], self.v_BSKE[:, :-1]
        else:  # the first of the new ones see tokens that the last of them push out
            held_BS = torch.cat([self._held(known_B1), positions_BT.masked_fill(~is_new_BT, PADDING)], dim=1)
            k_BSKE, v_BSKE = (torch.cat(x, 1) for x in ((self.k_BSKE[:, :-1], k_BTKE), (self.v_BSKE[:, :-1], v_BTKE)))
            is_kept_BT = (positions_BT >= after_B1 - self._ring_tokens) | (positions_BT < self.num_sink_tokens)
            self._write(k_BTKE, v_BTKE, positions_BT, is_new_BT & is_kept_BT)
        found = Places(
            positions_BT,
            held_BS,
            torch.where(is_new_BT, 0, PADDING),
            torch.where(held_BS == PADDING, PADDING, 0),
        )
        return k_BSKE, v_BSKE, found

    @property
    def _ring_tokens(self) -> int:
        return self.k_BSKE.shape[1] - 1 - self.num_sink_tokens

    def _held(self, length_B1: Tensor) -> Tensor:
        """The position that each slot but the bin holds in a row of this length, as held_BS; PADDING where none."""
        slots_S = torch.arange(self.k_BSKE.shape[1] - 1, device=self.k_BSKE.device)
        in_ring_BS = slots_S - self.num_sink_tokens
        last_B1 = length_B1 - 1 - self.num_sink_tokens
        ring_BS = last_B1 - (last_B1 - in_ring_BS) % self._ring_tokens + self.num_sink_tokens
        is_sink_S = slots_S < self.num_sink_tokens
        held_BS = torch.where(is_sink_S, slots_S, ring_BS)
        is_held_BS = (held_BS < length_B1) & (held_BS >= torch.where(is_sink_S, 0, self.num_sink_tokens))
        return held_BS.masked_fill(~is_held_BS, PADDING)

    def _write(self, k_BTKE: Tensor, v_BTKE: Tensor, positions_BT: Tensor, is_kept_BT: Tensor) -> None:
        in_ring_BT = self.num_sink_tokens + (positions_BT - self.num_sink_tokens) % self._ring_tokens
        slots_BT = torch.where(positions_BT < self.num_sink_tokens, positions_BT, in_ring_BT)
        slots_BT = slots_BT.masked_fill(~is_kept_BT, self.k_BSKE.shape[1] - 1)
        index = slots_BT[:, :, None, None].expand_as(k_BTKE)
        self.k_BSKE.scatter_(1, index, k_BTKE)
        self.v_BSKE.scatter_(1, index, v_BTKE)

    def can_forget(self, length: int) -> bool:
        """While nothing has been pushed out."""
        return length < self.k_BSKE.shape[1]


@register("attention", Config)
class SlidingWindowAttention(Scored):
    """softmax(q k^T / sqrt(E)) v over the last W tokens: arXiv 2004.05150, section 3.1, looking back only.

    Whole rows go in blocks of W queries, each with the keys of its own block and of the one before: O(T W) time and
    memory. Decoding keeps W keys and values a row. Rows with padding or several texts go through a dense mask on a CPU,
    and through FlexAttention's blocks on CUDA.
    """

    masks = frozenset({"causal", "padding", "document"})

    def __init__(self, config: Config, dims: ModelDims, position: Position, layer: int) -> None:
        super().__init__(config, dims, position, layer)
        self.window_tokens: int = config.window_tokens
        self.num_sink_tokens = config.num_sink_tokens

    def forward(
        self,
        x_BTD: Tensor,
        *,
        positions_BT: Tensor,
        mask: Mask,
        cache: PastKeyValues | None = None,
        values_BTJ: Tensor | None = None,
    ) -> Tensor:
        """Mix tokens, as out_BTD; see the contract of GroupedQueryAttention.forward."""
        q_BTHE, k_BTKE, v_BTKE = self.project(x_BTD, positions_BT, values_BTJ)
        window = Window(self.window_tokens, self.num_sink_tokens)
        if cache is not None:
            out_BTHE = cache.attend(self, q_BTHE, k_BTKE, v_BTKE, mask)
        elif mask.places is not None:
            out_BTHE = self._attend(q_BTHE, k_BTKE, v_BTKE, mask.also(window), positions_BT)
        elif x_BTD.shape[1] <= self.window_tokens:
            out_BTHE = self._attend(q_BTHE, k_BTKE, v_BTKE, mask, positions_BT)
        else:
            out_BTHE = self._in_blocks(q_BTHE, k_BTKE, v_BTKE, window)
        return self.out(out_BTHE.flatten(-2))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, positions_BT: Tensor) -> Tensor:
        bias_BHTS = self.bias(positions_BT, mask.places)
        return self.scored(q, k, v, mask, bias_BHTS)

    def _in_blocks(self, q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, window: Window) -> Tensor:
        """The attention of whole rows, one text each: every block of W queries is a row of its own for the kernel.

        It looks at the block before its own, too; the first has none, so that plain causality is all of its mask.
        """
        batch, num_tokens = q_BTHE.shape[:2]
        width, num_sinks = window.window_tokens, min(window.num_sink_tokens, num_tokens)
        fill = -num_tokens % width
        filled = (pad(x, (0, 0, 0, 0, 0, fill)) if fill else x for x in (q_BTHE, k_BTKE, v_BTKE))  # pad always copies
        positions_CW = torch.arange(num_tokens + fill, device=q_BTHE.device).unflatten(0, (-1, width))
        q, k, v = (x[:, :width] for x in (q_BTHE, k_BTKE, v_BTKE))
        first_BWHE = self._attend(q, k, v, Mask(), positions_CW[:1])

        q_CWHE, *keys = (x.unflatten(1, (-1, width)) for x in filled)
        k_CSKE, v_CSKE = (torch.cat([x[:, :-1], x[:, 1:]], dim=2) for x in keys)
        held_CS = torch.cat([positions_CW[:-1], positions_CW[1:]], dim=1)
        places = Places(positions_CW[1:2], held_CS[:1])  # all blocks are alike: distances are all that counts
        if num_sinks:
            # Sinks stand first; one that is within the blocks too comes there later than any query, or it counts twice.
            sinks_CS = torch.arange(num_sinks, device=q_BTHE.device).expand(len(held_CS), -1)
            held_CS = torch.cat([sinks_CS, held_CS.masked_fill(held_CS < num_sinks, num_tokens + fill)], dim=1)
            places = Places(positions_CW[1:].repeat(batch, 1), held_CS.repeat(batch, 1))
            sinks = (x[:, None, :num_sinks].expand(-1, len(held_CS), -1, -1, -1) for x in (k_BTKE, v_BTKE))
            k_CSKE, v_CSKE = (torch.cat(x, dim=2) for x in zip(sinks, (k_CSKE, v_CSKE), strict=True))
        q, k, v = (x.flatten(0, 1) for x in (q_CWHE[:, 1:], k_CSKE, v_CSKE))
        rest_CWHE = self._attend(q, k, v, Mask((CAUSAL_MASK, window), places), places.q_positions_BT)
        rest_BTHE = rest_CWHE.unflatten(0, (batch, -1)).flatten(1, 2)[:, : num_tokens - width]
        return torch.cat([first_BWHE, rest_BTHE], dim=1)

    def new_state(self, batch: int, max_tokens: int, like: Tensor) -> RecentKeyValues:
        """An empty state of B rows for decoding."""
        num_sinks = min(self.num_sink_tokens, max_tokens)
        ring = max(1, min(self.window_tokens, max_tokens - num_sinks))
        return RecentKeyValues.empty(batch, num_sinks, ring, (self.num_kv_heads, self.head_dim), like)

    def attend_flops(self, context_tokens: int) -> float:
        """Forward FLOPs per token beside the matrices: scores and values of the pairs in the window and with the sinks.

        Both begin with a triangle, as all pairs are one: until the window is full, and until all sinks are beyond it.
        """
        width = min(self.window_tokens, context_tokens)
        beyond = context_tokens - width
        num_sinks = min(self.num_sink_tokens, beyond)
        pairs = width**2 / 2 + beyond * width + num_sinks**2 / 2 + (beyond - num_sinks) * num_sinks
        return 4.0 * self.num_heads * self.head_dim * pairs / context_tokens
