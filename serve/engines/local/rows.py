"""A runner for layers that remember in ways of their own: each sequence is a row of the model's own cache.

Sums, features, whatever a kind of attention keeps: `new_state` makes it, `step` continues it, and nothing is known of
it here but that it has rows. One member each; the rows in use are kept dense, so that they are a view of the cache.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from serve.engines.local.leaves import call_directly
from serve.engines.local.runner import Work
from ulm import registry
from ulm.checkpoints import store
from ulm.components.cache import Cache
from ulm.models.account import cache_bytes
from ulm.spec import ModelSpec


@dataclass(eq=False)
class RowSeat:
    """A row of the cache; its number changes when an earlier one is given back."""

    row: int
    num_known: int = 0


class Rows:
    """One member of a spec whose layers keep states of their own."""

    max_slots = 1

    def __init__(
        self,
        spec: ModelSpec,
        *,
        dtype: torch.dtype,
        device: torch.device,
        kv_cache_bytes: int,
        max_rows: int,
        num_prefixes: int,
    ) -> None:
        self.spec, self.device, self._num_prefixes = spec, device, num_prefixes
        # A CPU computes in float32; weights that were asked for in less are rounded, or answers would differ by device.
        self._rounded, self._dtype = dtype, torch.float32 if device.type == "cpu" else dtype
        self.model = registry.find("model", spec.model)(spec).to(device, self._dtype).eval().requires_grad_(False)
        call_directly(self.model)
        size = cache_bytes(spec, self._dtype)
        self._row_bytes = size.fixed + size.per_token * spec.context_tokens
        self.max_rows = max(1, min(max_rows, kv_cache_bytes // self._row_bytes))
        self.cache: Cache = self.model.new_cache(self.max_rows)
        self.seats: list[RowSeat] = []
        self.used_slots: set[int] = set()
        self._prefixes: OrderedDict[tuple[int, ...], Cache] = OrderedDict()

    def put(self, slot: int, tensors: dict[str, Tensor]) -> None:
        """The member's weights."""
        with torch.no_grad():
            for name, own in store.tensors(self.model).items():
                own.copy_(tensors[name].to(self._rounded) if tensors[name].is_floating_point() else tensors[name])

    def drop(self, slot: int, key: Hashable) -> None:
        """Forget the remembered texts; the weights go with the runner."""
        self._prefixes.clear()
        self.used_slots.discard(slot)

    # ---- seats

    def fits(self, num_tokens: int, num_seats: int) -> bool:
        """Whether there are rows enough; each holds a whole context."""
        return num_seats <= self.max_rows

    def open(
        self, slot: int, key: Hashable, tokens: Sequence[int], max_shared: int, need_scores: bool
    ) -> RowSeat | None:
        """An empty row, or None."""
        if len(self.seats) >= self.max_rows:
            return None
        self.cache.lengths_B[len(self.seats)] = 0
        self.seats.append(RowSeat(len(self.seats)))
        return self.seats[-1]

    def has_room(self, seats: Sequence[RowSeat], num_tokens: int) -> bool:
        """Always: a row holds a whole context."""
        return True

    def extend(self, seat: RowSeat, num_tokens: int) -> bool:
        """Always: a row holds a whole context."""
        return True

    def advance(self, seat: RowSeat, tokens: Sequence[int], scores: object = None) -> None:
        """Nothing but the count: the cache has grown in `run`."""
        seat.num_known = len(tokens)

    def fork(self, seat: RowSeat) -> RowSeat | None:
        """A copy of a row."""
        if len(self.seats) >= self.max_rows:
            return None
        made = RowSeat(len(self.seats), seat.num_known)
        self.cache.copy_row(seat.row, made.row)
        self.seats.append(made)
        return made

    def close(self, seat: RowSeat) -> None:
        """Give a row back; the last one in use moves into the gap."""
        last = self.seats.pop()
        if last is not seat:
            self.cache.copy_row(last.row, seat.row)
            last.row = seat.row
            self.seats[last.row] = last

    # ---- passes

    @torch.no_grad()
    def run(self, work: Sequence[Work]) -> tuple[Tensor, list[tuple[int, int]]]:
        """All single tokens in one pass over the rows in use; longer pieces one by one."""
        found: dict[int, Tensor] = {}
        singles = [n for n, piece in enumerate(work) if len(piece.tokens) == 1 and piece.want in ("last", "none")]
        if len(singles) > 1:
            num_rows = len(self.seats)
            tokens_BT, num_new_B = torch.zeros(num_rows, 1, dtype=torch.long), torch.zeros(num_rows, dtype=torch.long)
            for n in singles:
                tokens_BT[work[n].seat.row, 0], num_new_B[work[n].seat.row] = work[n].tokens[0], 1
            logits_BV = self.model.step(tokens_BT.to(self.device), self.cache.rows(0, num_rows), num_new_B)[:, -1]
            found = {n: logits_BV[work[n].seat.row][None] for n in singles}
        for n, piece in enumerate(work):
            if n not in found:
                tokens_BT = torch.tensor([list(piece.tokens)], device=self.device)
                row = self.cache.rows(piece.seat.row, piece.seat.row + 1)
                step = self.model.step_hidden if piece.want == "hidden" else self.model.step
                found[n] = step(tokens_BT, row)[0]
        pieces, bounds, end = [], [], 0
        for n, piece in enumerate(work):
            rows = found[n][:0] if piece.want == "none" else found[n][-1:] if piece.want == "last" else found[n]
            pieces.append(rows.float())
            bounds.append((end, end + len(rows)))
            end += len(rows)
        return torch.cat(pieces), bounds

    @torch.no_grad()
    def next_logits(self, tokens: Sequence[int]) -> Tensor:
        """Logits after `tokens`, as logits_V. A text that goes on from one asked for lately is not run again."""
        ids = tuple(tokens)
        shared = {known: _common(known, ids) for known in self._prefixes}
        best = max(shared, key=shared.__getitem__, default=())
        if best and shared[best] == len(best):
            cache = self._prefixes.pop(best)  # grows in place
        elif len(self._prefixes) >= self._num_prefixes:
            cache = self._prefixes.popitem(last=False)[1]  # the oldest text makes room
            cache.truncate(0, 0)
        else:
            cache = self.model.new_cache(1)
        cache.truncate(0, min(int(cache.lengths_B[0]), len(ids) - 1))  # the last token must be run for its logits
        new = ids[int(cache.lengths_B[0]) :]
        logits_V: Tensor = self.model.step(torch.tensor([new], device=self.device), cache)[0, -1].float()
        self._prefixes[ids] = cache
        return logits_V

    def end(self) -> None:
        """Nothing works in the background."""

    def stats(self) -> dict[str, float]:
        """Memory."""
        prefixes = sum(cache.nbytes for cache in self._prefixes.values())
        return {
            "weight_bytes": float(sum(p.nbytes for p in self.model.parameters())),
            "kv_cache_bytes": float(self.cache.nbytes + prefixes),
            "kv_cache_used_bytes": float(len(self.seats) * self._row_bytes + prefixes),
        }


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
