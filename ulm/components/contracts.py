"""What components agree on: shape letters, sizes, positions, masks, and what an attention says of itself.

Shape letters, as suffixes of tensor names:
B batch, T new tokens, S known tokens (cache and new), D model width, H heads, K key/value heads, E head width,
V vocabulary, W windows, N members (or experts), F features, C chunks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor

PADDING = -1  # the segment of a place that holds no token


@dataclass(frozen=True)
class ModelDims:
    """The sizes that every component may need."""

    d_model: int
    num_layers: int
    vocab_size: int
    context_tokens: int
    head_dim: int
    num_heads: int = 1
    num_kv_heads: int = 1


class Position(Protocol):
    """How a position enters a model. A kind fills what it needs; the rest is the identity."""

    has_bias: bool  # whether `bias` gives one; an attention without scores cannot take it
    is_of_model: bool  # it embeds or has weights, so a model has one; of the others each layer may have its own

    def embed(self, x_BTD: Tensor, positions_BT: Tensor) -> Tensor:
        """Token embeddings with their positions, once, before the first layer. positions_BT may have B = 1.

        Padding stands at the context's end, one position past the last.
        """
        ...

    def rotate(self, x_BTHE: Tensor, positions_BT: Tensor) -> Tensor:
        """Queries or keys, turned by their positions. positions_BT may have B = 1."""
        ...

    def bias(self, positions_BT: Tensor, positions_BS: Tensor) -> Tensor | None:
        """Addition to the attention scores as bias_BHTS, or None. B may be 1.

        A function of the distance alone: of q - k, wherever the two stand.
        """
        ...


# ---- masks


@dataclass(frozen=True)
class Places:
    """Where T queries and S keys stand in B rows, or in one row for all (B = 1).

    Segments number the texts of a row from 0, PADDING is no token; None is one text without padding.
    """

    q_positions_BT: Tensor
    k_positions_BS: Tensor
    q_segments_BT: Tensor | None = None
    k_segments_BS: Tensor | None = None
    prefix_tokens_B: Tensor | None = None
    # Only with a cache: tokens that a row had before this call, and how many of its T are new; the rest is padding.
    known_B: Tensor | None = None
    num_new_B: Tensor | None = None


@dataclass(frozen=True)
class Pair:
    """A query and a key, or all pairs of them: tensors of one shape, or that broadcast to one."""

    q_position: Tensor
    k_position: Tensor
    q_segment: Tensor | None
    k_segment: Tensor | None
    prefix_tokens: Tensor | None


class MaskKind(Protocol):
    """One condition on who may look at whom."""

    is_causal: bool  # whether it keeps a token from what comes after it

    def allowed(self, pair: Pair) -> Tensor | None:
        """Whether the query may look at the key, elementwise; None: always."""
        ...


@dataclass(frozen=True)
class Mask:
    """Who may look at whom in one call: where all of its kinds allow it.

    Without places the T queries are the T keys, in order, one text a row, and plain causality is all: what kernels
    do best, so that nothing is materialised.
    """

    kinds: tuple[MaskKind, ...] = ()
    places: Places | None = None
    _dense_BTS: Tensor | None = None

    def allowed_BTS(self) -> Tensor | None:
        """The mask as booleans, B = 1 where all rows have the same; None is plain causality."""
        if self.places is None:
            return None
        return self._dense_BTS if self._dense_BTS is not None else _dense(self.kinds, self.places)

    def dense(self) -> Mask:
        """The same with its booleans made once, for all layers."""
        return replace(self, _dense_BTS=self.allowed_BTS())

    def also(self, kind: MaskKind) -> Mask:
        """The same with one more condition. Only of a mask with places."""
        assert self.places is not None
        known = self.allowed_BTS()
        more = _dense((kind,), self.places)
        return replace(self, kinds=(*self.kinds, kind), _dense_BTS=more if known is None else known & more)

    def at(self, b: Any, t: Any, s: Any) -> Tensor | None:
        """Whether query t of row b may look at key s; indices may be tensors, as FlexAttention gives them."""
        assert self.places is not None
        places = self.places
        rows = len(places.q_positions_BT), len(places.k_positions_BS)
        pair = Pair(
            places.q_positions_BT[b if rows[0] > 1 else 0, t],
            places.k_positions_BS[b if rows[1] > 1 else 0, s],
            None if places.q_segments_BT is None else places.q_segments_BT[b, t],
            None if places.k_segments_BS is None else places.k_segments_BS[b, s],
            None if places.prefix_tokens_B is None else places.prefix_tokens_B[b],
        )
        return _all(self.kinds, pair)


def _dense(kinds: tuple[MaskKind, ...], places: Places) -> Tensor:
    segments = (places.q_segments_BT, places.k_segments_BS)
    pair = Pair(
        places.q_positions_BT[:, :, None],
        places.k_positions_BS[:, None, :],
        None if segments[0] is None else segments[0][:, :, None],
        None if segments[1] is None else segments[1][:, None, :],
        None if places.prefix_tokens_B is None else places.prefix_tokens_B[:, None, None],
    )
    allowed = _all(kinds, pair)
    return (pair.q_position >= pair.k_position) | True if allowed is None else allowed


def _all(kinds: tuple[MaskKind, ...], pair: Pair) -> Tensor | None:
    allowed: Tensor | None = None
    for kind in kinds:  # a plain loop: torch.compile reads this for FlexAttention
        found = kind.allowed(pair)
        if found is not None:
            allowed = found if allowed is None else allowed & found
    return allowed
