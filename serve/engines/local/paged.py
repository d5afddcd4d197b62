"""Keys and values of one layer in pages of 16 positions, and attention over them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from serve.engines.local import kernels
from serve.engines.local.flat import Flat
from ulm.components.attend import naive
from ulm.components.contracts import Mask, Pair, Places

PAGE_TOKENS = 16


class PagedKeyValues:
    """Memory for num_pages pages; what stands where is the caller's to know. Page 0 belongs to nobody.

    A page is [K, E, 16] of keys and [K, 16, E] of values for the kernels; without them [16, K, E] of each. E of the
    values is rounded up to 16. Memory is taken from the system as it is first written.
    """

    def __init__(
        self, num_pages: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._is_native = device.type == "cpu" and kernels.load() is None
        padded_dim = _padded(head_dim)
        k_shape, v_shape = (PAGE_TOKENS, num_kv_heads, head_dim), (PAGE_TOKENS, num_kv_heads, padded_dim)
        if self._is_native:
            k_shape, v_shape = (num_kv_heads, head_dim, PAGE_TOKENS), (num_kv_heads, PAGE_TOKENS, padded_dim)
        self.k_pages = torch.empty(num_pages, *k_shape, dtype=dtype, device=device)
        self.v_pages = torch.empty(num_pages, *v_shape, dtype=dtype, device=device)

    @staticmethod
    def page_bytes(num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Memory of one page, without making any."""
        return PAGE_TOKENS * num_kv_heads * (head_dim + _padded(head_dim)) * dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Memory of all pages."""
        return self.k_pages.nbytes + self.v_pages.nbytes

    def copy_page(self, source: int, target: int) -> None:
        """Make page `target` equal to page `source`."""
        self.k_pages[target] = self.k_pages[source]
        self.v_pages[target] = self.v_pages[source]

    def attend(
        self,
        q_BHE: Tensor,
        k_BKE: Tensor,
        v_BKE: Tensor,
        flat: Flat,
        group: int,
        *,
        window_tokens: int | None = None,
        num_sink_tokens: int = 0,
        soft_cap: float | None = None,
        sinks_H: Tensor | None = None,
        bias_HS: Tensor | None = None,
    ) -> Tensor:
        """Writes all keys and values, then attends from each token to its sequence up to itself, as out_BHE.

        A window counts the token itself; the first `num_sink_tokens` are seen besides. `sinks_H` and `soft_cap`: see
        `naive`. `bias_HS` is added to a score by the distance of query and key, S of them. A page outside of the window
        may be -1. A filling token gets zeros.
        """
        if self._is_native:
            out_BHE: Tensor = torch.ops.ulm_engine.attend.default(
                *(q_BHE, k_BKE, v_BKE, self.k_pages, self.v_pages),
                *(flat.tables_NC[group], flat.spans_B, flat.positions_B),
                *(window_tokens or 0, num_sink_tokens, soft_cap or 0.0, sinks_H, bias_HS),
            )
            return out_BHE
        spans_B, positions_B = flat.spans_B, flat.positions_B
        pages_B = flat.tables_NC[group][spans_B, positions_B // PAGE_TOKENS].long()
        places_B = positions_B % PAGE_TOKENS
        self.k_pages[pages_B, places_B] = k_BKE.to(self.k_pages.dtype)
        dim = v_BKE.shape[-1]
        self.v_pages[pages_B, places_B, :, :dim] = v_BKE.to(self.v_pages.dtype)
        seen = _Seen(window_tokens, num_sink_tokens)
        parts = []
        for first, end, width in _blocks(flat, len(q_BHE)):
            q_BTHE = q_BHE[first:end].reshape(-1, width, *q_BHE.shape[1:])
            q_positions_BT = positions_B[first:end].reshape(-1, width)
            table_BC = flat.tables_NC[group][spans_B[first:end:width]].long().clamp(min=0)
            # All the table, whatever is in use: a step's shapes must not depend on positions, nor wait for them.
            k_BSKE = self.k_pages[table_BC].flatten(1, 2).to(q_BHE.dtype)
            v_BSKE = self.v_pages[table_BC, ..., :dim].flatten(1, 2).to(q_BHE.dtype)
            k_positions_BS = torch.arange(k_BSKE.shape[1], device=q_BHE.device)[None]
            mask = Mask((seen,), Places(q_positions_BT, k_positions_BS)).dense()
            allowed_BTS = mask.allowed_BTS()
            assert allowed_BTS is not None
            # What was never written may be NaN, and no share of 0 keeps NaN out.
            v_BSKE = v_BSKE.masked_fill(~allowed_BTS.any(1)[..., None, None], 0)
            bias_BHTS = None
            if bias_HS is not None:
                distance_BTS = q_positions_BT[:, :, None] - k_positions_BS[:, None]
                bias_BHTS = bias_HS[:, distance_BTS.clamp(0, bias_HS.shape[1] - 1)].transpose(0, 1)
            out_BTHE = naive(q_BTHE, k_BSKE, v_BSKE, mask, bias_BHTS, soft_cap=soft_cap, sinks_H=sinks_H)
            parts.append(out_BTHE.flatten(0, 1))
        return torch.cat(parts).masked_fill((pages_B == 0)[:, None, None], 0)


class _Seen:
    """The past, all of it or a window and the first tokens."""

    is_causal = True

    def __init__(self, window_tokens: int | None, num_sink_tokens: int) -> None:
        self.window_tokens, self.num_sink_tokens = window_tokens, num_sink_tokens

    def allowed(self, pair: Pair) -> Tensor:
        past = pair.q_position >= pair.k_position
        if self.window_tokens is None:
            return past
        is_near = pair.q_position - pair.k_position < self.window_tokens
        return past & (is_near | (pair.k_position < self.num_sink_tokens))


def _blocks(flat: Flat, num_tokens: int) -> Iterator[tuple[int, int, int]]:
    """First token, end and tokens a row: spans of one token as rows of one block, the filling too; others alone."""
    first = 0  # of the spans of one token before the span that is looked at
    for begin, end in flat.bounds:
        if end - begin > 1:
            if begin > first:
                yield first, begin, 1
            yield begin, end, end - begin
            first = end
    if num_tokens > first:
        yield first, num_tokens, 1


def _padded(head_dim: int) -> int:
    return -(-head_dim // PAGE_TOKENS) * PAGE_TOKENS  # whole vectors of any processor
