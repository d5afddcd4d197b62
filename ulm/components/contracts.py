"""What components agree on: shape letters, sizes, positions, masks.

Shape letters, as suffixes of tensor names:
B batch, T new tokens, S known tokens (cache and new), D model width, H heads, K key/value heads, E head width,
V vocabulary, W windows, N members.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class ModelDims:
    """The sizes that every component may need."""

    d_model: int
    num_layers: int
    vocab_size: int
    context_tokens: int
    head_dim: int


class Position(Protocol):
    """How a position enters a model. A kind fills what it needs; the rest is the identity."""

    def embed(self, x_BTD: Tensor, positions_BT: Tensor) -> Tensor:
        """Token embeddings with their positions, once, before the first layer. positions_BT may have B = 1.

        Padding stands at the context's end, one position past the last.
        """
        ...

    def rotate(self, x_BTHE: Tensor, positions_BT: Tensor) -> Tensor:
        """Queries or keys, turned by their positions. positions_BT may have B = 1."""
        ...

    def bias(self, positions_BT: Tensor, positions_BS: Tensor) -> Tensor | None:
        """Addition to the attention scores as bias_BHTS, or None."""
        ...


@dataclass(frozen=True)
class Mask:
    """Who may look at whom. None means plain causal over equally many queries and keys, which kernels do best."""

    allowed_BTS: Tensor | None = None  # bool
