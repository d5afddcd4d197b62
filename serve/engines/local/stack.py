"""A stack: members of one spec in one model, which one pass of products serves together.

The component modules run as they are, on tokens laid end to end (flat.py). What holds weights is exchanged for a form
that holds those of several members, each in a slot; what looks at the past is given pages.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from serve.engines.local.compiled import Shapes
from serve.engines.local.flat import MAX_SLOTS, Flat, Span
from serve.engines.local.leaves import Current, call_directly, exchange, has_kernels, turn_natively
from serve.engines.local.matrix import settle
from serve.engines.local.paged import PAGE_TOKENS, PagedKeyValues
from serve.engines.local.pages import LayerGroup, Pages, Seat
from serve.engines.local.runner import Work
from ulm import registry
from ulm.components.attention._projected import Scored
from ulm.components.contracts import Mask
from ulm.models.account import on_meta
from ulm.spec import ModelSpec


class PagedState:
    """A layer's past in pages, as attention by scores wants it."""

    def __init__(self, pages: PagedKeyValues, group: int, current: Current) -> None:
        self.pages, self.group, self.current = pages, group, current
        self.bias_HS: Tensor | None = None  # by distance

    def attend(self, attention: Any, q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, mask: Mask) -> Tensor:
        """What the queries find, T = 1, as out_BTHE; the mask is the table's and the position's matter."""
        out_BHE = self.pages.attend(
            q_BTHE[:, 0],
            k_BTKE[:, 0],
            v_BTKE[:, 0],
            self.current.flat,
            self.group,
            window_tokens=attention.window_tokens,
            num_sink_tokens=attention.num_sink_tokens,
            soft_cap=attention.soft_cap,
            sinks_H=attention.sinks,
            bias_HS=self.bias_HS,
        )
        return out_BHE[:, None]


def can_stack(spec: ModelSpec) -> bool:
    """Whether all layers of a spec attend by scores, and so can have their past in pages."""
    return all(issubclass(registry.find("attention", layer.attention.kind), Scored) for layer in spec.blocks_of_weights)


class Stack:
    """Members of one spec. One thread runs it; `put` may come from another, for a slot that nobody uses yet."""

    def __init__(
        self,
        spec: ModelSpec,
        *,
        dtype: torch.dtype,
        device: torch.device,
        kv_cache_bytes: int,
        max_batch_tokens: int,
        compile_after_steps: int | None = None,
        max_compile_s: float = 0.0,
    ) -> None:
        self.spec, self.dtype, self.device = spec, dtype, device
        self.current = Current()
        self.model = on_meta(spec).eval().requires_grad_(False)
        # Activations: float32 on a CPU, whatever the weights are stored as.
        self.active_dtype = torch.float32 if device.type == "cpu" else dtype
        self._leaves = exchange(self.model, self.current, dtype, self.active_dtype, device)
        self.matrices = [matrix for leaf in self._leaves for matrix in getattr(leaf, "matrices", ())]
        self._own = self._materialise()
        call_directly(self.model)
        self.max_slots = 1 if self._own else MAX_SLOTS
        self.used_slots: set[int] = set()
        self.num_asked_tokens = self.num_shared_tokens = self.num_seats = 0
        self._lay_out_pages(kv_cache_bytes, max_batch_tokens)
        self.shapes = Shapes(self, compile_after_steps, max_compile_s)

    # ---- weights

    def _materialise(self) -> dict[str, nn.Parameter]:
        """Real tensors for what is left: constants, and parameters without a stacked form, of one member only."""
        for position, config in self.model.positions.items():
            real = registry.find("position", config.kind)(config, self.model.dims).to(self.device)
            for name, table in real.named_buffers(recurse=False):
                setattr(position, name, table)
            if has_kernels(self.device):
                turn_natively(position)
        own: dict[str, nn.Parameter] = {}
        for module_name, module in self.model.named_modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                real = torch.empty(parameter.shape, dtype=self.active_dtype, device=self.device)
                parameter = nn.Parameter(real, requires_grad=False)
                setattr_parameter(module, name, parameter)
                own[f"{module_name}.{name}".lstrip(".")] = parameter
        return own

    def put(self, slot: int, tensors: dict[str, Tensor]) -> None:
        """A member's weights, by their names in a checkpoint."""
        for leaf in self._leaves:
            leaf.put(slot, tensors)
        if has_kernels(self.device):
            settle(self.matrices, slot)
        for name, parameter in self._own.items():
            parameter.copy_(tensors[name])
        if any(position.has_bias for position in self.model.positions):
            self._tabulate_bias()

    def drop(self, slot: int, key: Hashable) -> None:
        """Forget a member's weights, and the pages of its texts."""
        self.pages.drop((slot, key))
        for leaf in self._leaves:
            leaf.drop(slot)
        self.used_slots.discard(slot)

    def _tabulate_bias(self) -> None:
        """What positions add to scores, by distance: it depends on nothing else."""
        last = self.spec.context_tokens - 1
        keys_BS = torch.arange(last, -1, -1, device=self.device)[None]
        tables = {
            position: position.bias(keys_BS[:, :1], keys_BS)[0, :, 0].to(self.active_dtype).contiguous()
            for position in self.model.positions
            if position.has_bias
        }
        for block, state in zip(self.model.layers, self.states, strict=True):
            state.bias_HS = tables.get(block.attention.position)

    @property
    def weight_bytes(self) -> int:
        """Memory of all members' weights."""
        own = sum(parameter.nbytes for parameter in self._own.values())
        return own + sum(int(leaf.nbytes) for leaf in self._leaves)

    # ---- pages

    def _lay_out_pages(self, kv_cache_bytes: int, max_batch_tokens: int) -> None:
        """Divide the cache among groups of layers, so that each group has room for as many sequences."""
        layers, context_tokens = self.model.layers, self.spec.context_tokens
        kinds = [(block.attention.window_tokens, block.attention.num_sink_tokens) for block in layers]
        groups = sorted(set(kinds), key=kinds.index)
        row_pages, page_bytes = [], []
        for window_tokens, num_sink_tokens in groups:
            seen = context_tokens
            if window_tokens is not None:
                seen = min(seen, window_tokens + num_sink_tokens + max_batch_tokens + 2 * PAGE_TOKENS)
            row_pages.append(-(-seen // PAGE_TOKENS))
            sizes = [
                PagedKeyValues.page_bytes(block.attention.num_kv_heads, block.attention.head_dim, self.dtype)
                for block, kind in zip(layers, kinds, strict=True)
                if kind == (window_tokens, num_sink_tokens)
            ]
            page_bytes.append(sum(sizes))
        row_bytes = sum(pages * size for pages, size in zip(row_pages, page_bytes, strict=True))
        num_rows = kv_cache_bytes / row_bytes
        self._page_bytes, self._row_pages = page_bytes, row_pages
        sizes = [max(2, int(num_rows * pages)) for pages in row_pages]
        self.pages = Pages(
            [LayerGroup(size, *group) for size, group in zip(sizes, groups, strict=True)], page_tokens=PAGE_TOKENS
        )
        self.max_pages = -(-context_tokens // PAGE_TOKENS)
        self.stores = [
            PagedKeyValues(
                sizes[groups.index(kind)],
                block.attention.num_kv_heads,
                block.attention.head_dim,
                dtype=self.dtype,
                device=self.device,
            )
            for block, kind in zip(layers, kinds, strict=True)
        ]
        self._group_of_layer = [groups.index(kind) for kind in kinds]
        self.states = [
            PagedState(store, group, self.current)
            for store, group in zip(self.stores, self._group_of_layer, strict=True)
        ]

    def fits(self, num_tokens: int, num_seats: int) -> bool:
        """Whether so many sequences of so many tokens could be held when nobody else is there."""
        return self.pages.fits(num_tokens, num_seats)

    def open(self, slot: int, key: Hashable, tokens: Sequence[int], max_shared: int, need_scores: bool) -> Seat:
        """A seat for a sequence, with the pages that are still known of its first `max_shared` tokens."""
        seat = self.pages.open((slot, key), tokens, max_shared, need_scores)
        self.num_seats += 1
        self.num_asked_tokens += len(tokens)
        self.num_shared_tokens += seat.num_known
        return seat

    def has_room(self, seats: Sequence[Seat], num_tokens: int) -> bool:
        """Whether these seats could grow to so many tokens each now, with a page left for each of the others."""
        others = self.num_seats - len(seats)
        needed = [-(-(num_tokens - seat.num_known) // PAGE_TOKENS) + 1 for seat in seats]
        return not others or all(
            self.pages.num_free(group) >= sum(min(pages, most) for pages in needed) + others
            for group, most in enumerate(self._row_pages)
        )

    def extend(self, seat: Seat, num_tokens: int) -> bool:
        """Pages for the tokens up to so many; False: there are none, and nothing has changed."""
        copies = self.pages.extend(seat, num_tokens)
        for copy in copies or ():
            for store, group in zip(self.stores, self._group_of_layer, strict=True):
                if group == copy.group:
                    store.copy_page(copy.source, copy.target)
        return copies is not None

    def advance(self, seat: Seat, tokens: Sequence[int], scores: dict[int, Any] | None = None) -> None:
        """All of these tokens have been run."""
        self.pages.advance(seat, tokens, scores)

    def fork(self, seat: Seat) -> Seat:
        """A seat with the same pages; whoever writes first into a shared one, copies it."""
        self.num_seats += 1
        return self.pages.fork(seat)

    def close(self, seat: Seat) -> None:
        """Give pages back; full ones are found again until they are needed."""
        self.num_seats -= 1
        self.pages.close(seat)

    def end(self) -> None:
        """Wait for what works in the background."""
        self.shapes.join()

    def stats(self) -> dict[str, float]:
        """Memory, and how much of the prompts was known already."""
        used = sum(self.pages.num_used(group) * size for group, size in enumerate(self._page_bytes))
        return {
            "weight_bytes": float(self.weight_bytes),
            "kv_cache_bytes": float(sum(store.nbytes for store in self.stores)),
            "kv_cache_used_bytes": float(used),
            "prompt_tokens": float(self.num_asked_tokens),
            "shared_prompt_tokens": float(self.num_shared_tokens),
            "compiled_shapes": float(self.shapes.num_ready),
            "compiling": float(self.shapes.is_busy),
            "compile_seconds": self.shapes.seconds,
        }

    # ---- passes

    @torch.no_grad()
    def run(self, work: Sequence[Work]) -> tuple[Tensor, list[tuple[int, int]]]:
        """One pass over all of it. logits_CV in float32 (hidden states where all want those), and each piece's rows."""
        order = sorted(range(len(work)), key=lambda n: work[n].seat.key[0])
        spans = [Span(p.seat.key[0], p.start, p.tokens, p.seat.tables) for p in (work[n] for n in order)]
        shape = None
        if all(len(span.tokens) == 1 for span in spans) and work[0].want != "hidden":
            shape = self.shapes.find(len(spans), {span.slot for span in spans})
        flat = Flat.of(spans, self.max_pages, self.device, shape and shape[0])
        if shape is not None:
            rows_of = {n: place for place, n in enumerate(order)}
            return shape[1](flat).float(), [
                (rows_of[n], rows_of[n] + (piece.want != "none")) for n, piece in enumerate(work)
            ]
        self.current.flat = flat
        x_BTD: Tensor = self.model.advance(flat.tokens_B[:, None], flat.positions_B[:, None], Mask(), self.states)
        x_BD = x_BTD[:, 0]
        chosen: list[int] = []
        bounds = [(0, 0)] * len(work)
        for n, (begin, end) in zip(order, flat.bounds, strict=True):
            want = work[n].want
            rows = range(0) if want == "none" else range(end - 1, end) if want == "last" else range(begin, end)
            bounds[n] = len(chosen), len(chosen) + len(rows)
            chosen.extend(rows)
        if not chosen or work[0].want == "hidden":
            return x_BD[: len(chosen)].float(), bounds
        if len(chosen) < len(x_BD):
            index = torch.tensor(chosen, device=self.device)
            x_BD, self.current.flat = x_BD[index], flat.only(chosen, index)
        logits_CV: Tensor = self.model.head(x_BD[:, None])[:, 0]
        return logits_CV.float(), bounds


def setattr_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Replace a module's parameter; of a ParameterList, too, whose names are numbers."""
    module._parameters[name] = parameter
