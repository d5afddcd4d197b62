"""What a model remembers of B rows while it decodes: a state for every layer, and how long each row is.

A layer's state is a dataclass of tensors whose first dimension is the row. What of it counts follows from the row's
length alone, so a row is emptied by setting its length to 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from ulm.components.contracts import Mask, Places
from ulm.errors import ContextLengthError


class LayerState(Protocol):
    """A layer's memory of B rows: a dataclass of tensors."""

    def can_forget(self, length: int) -> bool:
        """Whether a row of `length` tokens can be cut back, as if its last tokens had never come."""
        ...


class PastKeyValues(Protocol):
    """A layer's memory for attention by scores: it takes new keys and values in, and looks up what queries may see.

    An engine may keep them in another way than the states here, behind this method.
    """

    def attend(self, attention: Any, q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, mask: Mask) -> Tensor:
        """What T new queries find, as out_BTHE; `attention` says what is done to its scores."""
        ...


@dataclass
class KeyValues:
    """All keys and values, indexed by position, so that rows may differ in length.

    The last slot is a bin for padding: written, never read.
    """

    k_BSKE: Tensor
    v_BSKE: Tensor

    @classmethod
    def empty(cls, batch: int, max_tokens: int, num_kv_heads: int, head_dim: int, like: Tensor) -> Self:
        """In the dtype and on the device of `like`."""
        shape = (batch, max_tokens + 1, num_kv_heads, head_dim)
        return cls(like.new_zeros(shape), like.new_zeros(shape))

    def append(self, k_BTKE: Tensor, v_BTKE: Tensor, places: Places) -> tuple[Tensor, Tensor]:
        """Write T new keys and values at their positions; returns the slots that the places name, as views."""
        positions_BT = places.q_positions_BT
        if positions_BT.shape[1] == 1:
            rows_B = torch.arange(len(positions_BT), device=positions_BT.device)
            self.k_BSKE[rows_B, positions_BT[:, 0]] = k_BTKE[:, 0]
            self.v_BSKE[rows_B, positions_BT[:, 0]] = v_BTKE[:, 0]
        else:
            index = positions_BT[:, :, None, None].expand_as(k_BTKE)
            self.k_BSKE.scatter_(1, index, k_BTKE)
            self.v_BSKE.scatter_(1, index, v_BTKE)
        num_known = places.k_positions_BS.shape[1]
        return self.k_BSKE[:, :num_known], self.v_BSKE[:, :num_known]

    def attend(self, attention: Any, q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, mask: Mask) -> Tensor:
        """What T new queries find among all known keys, theirs included, as out_BTHE."""
        assert mask.places is not None
        k_BSKE, v_BSKE = self.append(k_BTKE, v_BTKE, mask.places)
        out_BTHE: Tensor = attention.scored(q_BTHE, k_BSKE, v_BSKE, mask, attention.bias(None, mask.places))
        return out_BTHE

    def can_forget(self, length: int) -> bool:
        """Always: what stands behind a row's length is not read."""
        return True


class Cache:
    """The states of all layers for B rows of up to `max_tokens` tokens, and how long each row is."""

    def __init__(self, layers: list[Any], lengths_B: Tensor, max_tokens: int, device: torch.device) -> None:
        self.layers, self.lengths_B, self.max_tokens, self.device = layers, lengths_B, max_tokens, device
        self.prefix_tokens_B: Tensor | None = None  # on the device; None: no row has a prefix

    @property
    def nbytes(self) -> int:
        """Memory held."""
        return sum(x.nbytes for layer in self.layers for _, x in _tensors(layer))

    def rows(self, start: int, stop: int) -> Cache:
        """The same memory, seen as a cache of rows start … stop-1."""
        layers = [replace(layer, **{name: x[start:stop] for name, x in _tensors(layer)}) for layer in self.layers]
        seen = Cache(layers, self.lengths_B[start:stop], self.max_tokens, self.device)
        seen.prefix_tokens_B = None if self.prefix_tokens_B is None else self.prefix_tokens_B[start:stop]
        return seen

    def copy_row(self, source: int, target: int) -> None:
        """Make row `target` equal to row `source`."""
        length = int(self.lengths_B[source])
        for layer in self.layers:
            for _, x in _tensors(layer):
                part = slice(length) if isinstance(layer, KeyValues) else slice(None)  # no more than counts
                x[target, part] = x[source, part]
        self.lengths_B[target] = length
        if self.prefix_tokens_B is not None:
            self.prefix_tokens_B[target] = self.prefix_tokens_B[source]

    def truncate(self, row: int, length: int) -> int:
        """Forget what a row holds beyond `length`; returns how much it still holds.

        A bounded or recurrent state cannot go back, so such a row is emptied instead, and its text must be run again.
        """
        held = int(self.lengths_B[row])
        kept = min(length, held)
        # What would be left of a prefix has seen the rest of it.
        in_prefix = self.prefix_tokens_B is not None and kept < int(self.prefix_tokens_B[row])
        if kept < held and (in_prefix or not all(layer.can_forget(held) for layer in self.layers)):
            kept = 0
        self.lengths_B[row] = kept
        return kept

    def place(self, num_new_B: Tensor, width: int) -> Places:
        """Where `num_new_B` tokens in a block `width` wide stand, and the slots that can be read afterwards.

        Row b's new tokens are the first num_new_B[b] of the block; the rest is padding and goes to the bin, one
        position past the last. ContextLengthError where a row would be too long.
        """
        offsets_T = torch.arange(width)
        positions_BT = self.lengths_B[:, None] + offsets_T
        is_padding_BT = offsets_T >= num_new_B[:, None]
        positions_BT = positions_BT.masked_fill(is_padding_BT, self.max_tokens)
        num_known = int((self.lengths_B + num_new_B).max())
        if num_known > self.max_tokens:  # one too many would be read from the bin, without a word
            message = f"the cache holds {self.max_tokens} tokens a row, and a row would have {num_known}"
            message += ": a larger max_tokens for new_cache, up to the model's context_tokens"
            raise ContextLengthError(message, code="context_length_exceeded")
        if self.prefix_tokens_B is not None:
            split = (self.prefix_tokens_B.cpu() > self.lengths_B + num_new_B) & (num_new_B > 0)
            if split.any():
                message = "a prefix must come whole in one call: its tokens see each other"
                raise ContextLengthError(message, code="prefix_split")
        return Places(
            positions_BT.to(self.device),
            torch.arange(num_known)[None].to(self.device),
            prefix_tokens_B=self.prefix_tokens_B,
            known_B=self.lengths_B.to(self.device),
            num_new_B=num_new_B.to(self.device),
        )


def _tensors(layer: Any) -> Iterator[tuple[str, Tensor]]:
    return ((field.name, value) for field in fields(layer) if isinstance(value := getattr(layer, field.name), Tensor))
