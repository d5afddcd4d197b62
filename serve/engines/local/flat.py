"""The tokens of one step, of all answers and members, laid end to end."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

MAX_SLOTS = 256  # members that one stack can hold: tensors of addresses have this length, so that shapes never change


@dataclass(frozen=True)
class Span:
    """Consecutive new tokens of one sequence: where they begin in it, and where its pages are, by group of layers."""

    slot: int  # of its member in the stack
    start: int  # position of the first
    tokens: Sequence[int]
    tables: Sequence[Sequence[int]]  # by group of layers: the page of every PAGE_TOKENS positions; -1: given back


@dataclass(frozen=True)
class Flat:
    """B tokens of N spans, members' tokens side by side. A token is a row of its own: B = tokens, T = 1.

    What works on one token at a time (norms, projections, feed-forward layers, rotations) need not know more. Attention
    finds a token's past by its span's table. Tokens behind the last segment are filling, and count for nothing.
    """

    tokens_B: Tensor  # int64, as all below unless said
    positions_B: Tensor
    slots_B: Tensor
    spans_B: Tensor  # the span that each token belongs to
    segments_N3: Tensor  # on the CPU: row 0 is (number of segments, 0, 0), then (slot, first token, end) of each
    tables_NC: tuple[Tensor, ...]  # int32, by group of layers: N spans, C pages
    segments: tuple[tuple[int, int, int], ...]  # the same as segments_N3, for code that loops
    bounds: tuple[tuple[int, int], ...]  # of each span: first token, end

    @classmethod
    def of(cls, spans: Sequence[Span], max_pages: int, device: torch.device, num_tokens: int | None = None) -> Flat:
        """Spans, sorted by slot, as tensors; filled up to `num_tokens` where that is given.

        A filling token stands at position 0 of a span of its own, whose first page is 0, which belongs to nobody.
        """
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        numbers: list[int] = []
        segments: list[tuple[int, int, int]] = []
        bounds: list[tuple[int, int]] = []
        for number, span in enumerate(spans):
            begin, end = len(tokens), len(tokens) + len(span.tokens)
            tokens.extend(span.tokens)
            positions.extend(range(span.start, span.start + len(span.tokens)))
            slots.extend([span.slot] * len(span.tokens))
            numbers.extend([number] * len(span.tokens))
            bounds.append((begin, end))
            if segments and segments[-1][0] == span.slot:
                segments[-1] = (span.slot, segments[-1][1], end)
            else:
                assert not segments or segments[-1][0] < span.slot, "spans must be sorted by slot"
                segments.append((span.slot, begin, end))
        num_spans = len(spans)
        if num_tokens is not None and num_tokens > len(tokens):
            fill = num_tokens - len(tokens)
            numbers += range(num_spans, num_spans + fill)
            num_spans += fill
            tokens, positions, slots = (x + [0] * fill for x in (tokens, positions, slots))
        tables = []
        for group in range(len(spans[0].tables) if spans else 0):
            table_NC = np.zeros((num_spans, max_pages), dtype=np.int32)
            for number, span in enumerate(spans):
                pages = span.tables[group]
                table_NC[number, : len(pages)] = pages
            tables.append(torch.from_numpy(table_NC).to(device))
        # NumPy makes small tensors in a fraction of torch's time.
        made = torch.from_numpy(np.array([tokens, positions, slots, numbers], dtype=np.int64)).to(device)
        tokens_B, positions_B, slots_B, spans_B = made.unbind()
        segments_N3 = _as_tensor(tuple(segments))
        return cls(tokens_B, positions_B, slots_B, spans_B, segments_N3, tuple(tables), tuple(segments), tuple(bounds))

    def only(self, chosen: Sequence[int], index_C: Tensor) -> Flat:
        """Some of the tokens, in the same order, for what looks at no past: `chosen` and the same as a tensor."""
        segments: list[tuple[int, int, int]] = []
        begin = 0
        for slot, first, end in self.segments:
            count = bisect_left(chosen, end) - bisect_left(chosen, first)
            if count:
                segments.append((slot, begin, begin + count))
            begin += count
        return Flat(
            self.tokens_B[index_C],
            self.positions_B[index_C],
            self.slots_B[index_C],
            self.spans_B[index_C],
            _as_tensor(tuple(segments)),
            (),
            tuple(segments),
            (),
        )


@lru_cache(64)  # the next step mostly has the same members, each with as many tokens
def _as_tensor(segments: tuple[tuple[int, int, int], ...]) -> Tensor:
    segments_N3 = torch.zeros(MAX_SLOTS + 1, 3, dtype=torch.long)
    segments_N3[: len(segments) + 1] = torch.tensor([(len(segments), 0, 0), *segments])
    return segments_N3
