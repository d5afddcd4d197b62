"""The KV cache: keys and values of B rows, indexed by position, so that rows may have different lengths."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ulm.components.contracts import Mask
from ulm.errors import ContextLengthError


@dataclass
class LayerCache:
    """One layer's keys and values. The last slot is a bin for padding: written, never read."""

    k_BSKE: Tensor
    v_BSKE: Tensor

    def append(self, k_BTKE: Tensor, v_BTKE: Tensor, positions_BT: Tensor, num_known: int) -> tuple[Tensor, Tensor]:
        """Write T new keys and values at their positions; returns the first `num_known` slots as views."""
        if positions_BT.shape[1] == 1:
            rows_B = torch.arange(len(positions_BT), device=positions_BT.device)
            self.k_BSKE[rows_B, positions_BT[:, 0]] = k_BTKE[:, 0]
            self.v_BSKE[rows_B, positions_BT[:, 0]] = v_BTKE[:, 0]
        else:
            index = positions_BT[:, :, None, None].expand_as(k_BTKE)
            self.k_BSKE.scatter_(1, index, k_BTKE)
            self.v_BSKE.scatter_(1, index, v_BTKE)
        return self.k_BSKE[:, :num_known], self.v_BSKE[:, :num_known]


class Cache:
    """Keys and values of all layers for B rows of up to `max_tokens` tokens, and how long each row is."""

    def __init__(self, layers: list[LayerCache], lengths_B: Tensor) -> None:
        self.layers, self.lengths_B = layers, lengths_B

    @classmethod
    def empty(
        cls, num_layers: int, batch: int, max_tokens: int, num_kv_heads: int, head_dim: int, *, like: Tensor
    ) -> Cache:
        """A cache in the dtype and on the device of `like`."""
        shape = (batch, max_tokens + 1, num_kv_heads, head_dim)
        layers = [LayerCache(like.new_zeros(shape), like.new_zeros(shape)) for _ in range(num_layers)]
        return cls(layers, torch.zeros(batch, dtype=torch.long))

    @property
    def max_tokens(self) -> int:
        """Longest row this cache can hold."""
        return self.layers[0].k_BSKE.shape[1] - 1

    @property
    def nbytes(self) -> int:
        """Memory held."""
        return sum(x.nbytes for layer in self.layers for x in (layer.k_BSKE, layer.v_BSKE))

    def rows(self, start: int, stop: int) -> Cache:
        """The same memory, seen as a cache of rows start … stop-1."""
        layers = [LayerCache(layer.k_BSKE[start:stop], layer.v_BSKE[start:stop]) for layer in self.layers]
        return Cache(layers, self.lengths_B[start:stop])

    def copy_row(self, source: int, target: int) -> None:
        """Make row `target` equal to row `source`."""
        length = int(self.lengths_B[source])
        for layer in self.layers:
            for x in (layer.k_BSKE, layer.v_BSKE):
                x[target, :length] = x[source, :length]
        self.lengths_B[target] = length

    def truncate(self, row: int, length: int) -> None:
        """Forget what a row holds beyond `length`."""
        self.lengths_B[row] = min(length, int(self.lengths_B[row]))

    def place(self, num_new_B: Tensor, width: int) -> tuple[Tensor, Mask, int]:
        """positions_BT, mask and number of slots to read, for `num_new_B` tokens in a block `width` wide.

        Row b's new tokens are the first num_new_B[b] of the block; the rest is padding and goes to the bin.
        """
        device = self.layers[0].k_BSKE.device
        offsets_T = torch.arange(width)
        positions_BT = self.lengths_B[:, None] + offsets_T
        positions_BT = torch.where(offsets_T < num_new_B[:, None], positions_BT, self.max_tokens)
        num_known = int((self.lengths_B + num_new_B).max())
        if num_known > self.max_tokens:  # one too many would be read from the bin, without a word
            message = f"the cache holds {self.max_tokens} tokens a row, and a row would have {num_known}"
            raise ContextLengthError(message, code="context_length_exceeded")
        allowed_BTS = torch.arange(num_known) <= positions_BT[:, :, None]
        return positions_BT.to(device), Mask(allowed_BTS.to(device)), num_known
