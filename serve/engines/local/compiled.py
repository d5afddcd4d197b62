"""Passes of fixed shapes, made ready in the background: compiled on a CPU, recorded as CUDA graphs on a GPU.

Decoding runs the same few thousand small operations every step; for small models the time is Python's. A batch size
that has been used for a while is compiled with static shapes by torch.compile, by a thread of its own, while the plain
pass goes on answering. Smaller batches are filled up to it: filling tokens cost next to nothing.
"""

from __future__ import annotations

import copy
import logging
import sys
import threading
import time
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from serve.engines.local.flat import Flat
from serve.engines.local.leaves import has_kernels
from ulm import runtime
from ulm.components.contracts import Mask

log = logging.getLogger(__name__)
SIZES = (1, 8, 32, 128)  # tokens; larger batches have less of Python in them, and run as they are
SWITCH_S = 0.0005  # while another thread compiles; by Python's 0.005 each operator of a step may wait so long
Pass = Callable[[Flat], Tensor]  # the logits of each token, as logits_BV


class Shapes:
    """The sizes of a stack that are ready, and the making of more."""

    def __init__(self, stack: Any, after_steps: int | None, max_seconds: float) -> None:
        """A size is made ready once it was used `after_steps` times (None: never), until `max_seconds` are spent."""
        self._stack, self._after_steps, self._max_seconds = stack, after_steps, max_seconds
        self._ready: dict[tuple[int, int], Pass] = {}  # by size, and on a GPU by the slot that a graph is of
        self._uses: dict[tuple[int, int], int] = {}
        self._thread: threading.Thread | None = None
        # Plain products loop over the members of each step, which a fixed pass cannot have in it on a CPU.
        self._makes_more = after_steps is not None and (stack.device.type != "cpu" or has_kernels(stack.device))
        self.seconds = 0.0

    @property
    def num_ready(self) -> int:
        """Shapes that run fast now."""
        return len(self._ready)

    @property
    def is_busy(self) -> bool:
        """Whether another is in the making."""
        return self._thread is not None and self._thread.is_alive()

    def find(self, num_tokens: int, slots: set[int]) -> tuple[int, Pass] | None:
        """The size to fill a decoding pass up to, and how it is run; None: as it is, by the plain pass."""
        size = next((size for size in SIZES if size >= num_tokens), None)
        if size is None:
            return None
        key = size, 0
        if self._stack.device.type != "cpu":
            if len(slots) > 1:  # a graph has the addresses of one member's weights
                return None
            key = size, next(iter(slots))
        if (found := self._ready.get(key)) is not None:
            return size, found
        if not self._makes_more:
            return None
        self._uses[key] = self._uses.get(key, 0) + 1
        if self._uses[key] >= (self._after_steps or 0) and not self.is_busy:
            self._begin(key)
        return None

    def _begin(self, key: tuple[int, int]) -> None:
        if self._stack.device.type == "cuda":
            self._make(key)  # recording takes milliseconds, and no other thread may use the device meanwhile
            return
        if self.seconds >= self._max_seconds:
            log.info("%.0f s were spent on compiling, the most allowed: other batch sizes run uncompiled", self.seconds)
            self._makes_more = False
            return
        if not runtime.can_compile(self._stack.device):
            log.warning("torch.compile has no compiler or no Python headers here: passes run uncompiled")
            self._makes_more = False
            return
        self._thread = threading.Thread(target=self._make, args=(key,), name="local-engine-compile", daemon=True)
        self._thread.start()

    def _make(self, key: tuple[int, int]) -> None:
        started_s, interval_s = time.monotonic(), sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_S)
        try:
            make = _recorded if self._stack.device.type == "cuda" else _compiled
            self._ready[key] = make(self._stack, *key)
        except Exception as error:  # noqa: BLE001  whatever the compiler could not do: the plain pass goes on
            log.warning("batches of %d and others run uncompiled: %s", key[0], str(error).strip().splitlines()[:1])
            self._makes_more = False  # what fails at one size fails at the next
        else:
            log.info("batches of up to %d are compiled, in %.1f s", key[0], time.monotonic() - started_s)
        finally:
            sys.setswitchinterval(interval_s)
            self.seconds += time.monotonic() - started_s

    def join(self) -> None:
        """Wait for what is in the making; nothing more is begun."""
        self._makes_more = False
        if self._thread is not None:
            self._thread.join()


def _twin(stack: Any) -> tuple[Any, Any, list[Any]]:
    """Model, current tokens and states of a stack once more, over the same weights and pages.

    A thread that compiles must not share the note of which tokens a pass is about with the one that answers.
    """
    shared = [*stack.model.parameters(), *stack.model.buffers(), *stack.matrices, *stack.stores, stack.model.spec]
    shared += [state.bias_HS for state in stack.states if state.bias_HS is not None]
    memo = {id(each): each for each in shared}
    model, current, states = copy.deepcopy((stack.model, stack.current, stack.states), memo)
    return model, current, states


def _compiled(stack: Any, size: int, slot: int) -> Pass:
    """A pass compiled with static shapes, entered without Dynamo's guards: they would take a fifth of a small step.

    Nothing that they watch can change: weights and pages are found by addresses in tensors that stay what they are.
    """
    from torch._inductor.compile_fx import compile_fx  # takes a second, which an engine that answers must not wait for

    model, current, states = _twin(stack)
    entered: list[Any] = []  # the compiled function, and what it was called with

    def backend(graph: Any, examples: Any) -> Any:
        # With the C++ wrapper a pass of one token took 3.1 ms, with Python's 3.6 (docs/experiments.md).
        compiled: Any = compile_fx(graph, examples, config_patches={"cpp_wrapper": True})

        def enter(*inputs: Tensor) -> Any:
            entered[:] = compiled, inputs
            return compiled(*inputs)

        return enter

    def advance(
        tokens_B: Tensor,
        positions_B: Tensor,
        slots_B: Tensor,
        spans_B: Tensor,
        segments_N3: Tensor,
        tables_NC: tuple[Tensor, ...],
    ) -> Tensor:
        current.flat = Flat(tokens_B, positions_B, slots_B, spans_B, segments_N3, tables_NC, (), ())
        x_BTD: Tensor = model.advance(tokens_B[:, None], positions_B[:, None], Mask(), states)
        logits_BTV: Tensor = model.head(x_BTD)
        return logits_BTV[:, 0]

    # Dynamo keeps what it has compiled by code object, eight times at most: each pass has one of its own.
    own_advance = FunctionType(advance.__code__.replace(), globals(), "advance", None, advance.__closure__)
    example = _filling(stack, size, 0)
    with torch.no_grad():
        found = torch.compile(own_advance, backend=backend, fullgraph=True, dynamic=False)(*_inputs(example))
    compiled, inputs = entered
    entered.clear()  # Dynamo goes on holding the backend's function, which must not hold a dropped stack's pages
    own = [next((n for n, x in enumerate(_flattened(example)) if x is each), None) for each in inputs]
    kept = [None if place is not None else each for each, place in zip(inputs, own, strict=True)]
    assert found.shape[0] == size

    def run(flat: Flat) -> Tensor:
        given = _flattened(flat)
        values = [each if place is None else given[place] for each, place in zip(kept, own, strict=True)]
        logits_BV: Tensor = compiled(*values)[0]
        return logits_BV

    return run


def _inputs(flat: Flat) -> tuple[Any, ...]:
    return flat.tokens_B, flat.positions_B, flat.slots_B, flat.spans_B, flat.segments_N3, flat.tables_NC


def _flattened(flat: Flat) -> list[Tensor]:
    return [flat.tokens_B, flat.positions_B, flat.slots_B, flat.spans_B, flat.segments_N3, *flat.tables_NC]


def _recorded(stack: Any, size: int, slot: int) -> Pass:
    """A CUDA graph of one member's pass. Its inputs stand at fixed places, which every pass fills anew."""
    model, current, states = _twin(stack)
    still = _filling(stack, size, slot)
    current.flat = still

    def advance() -> Tensor:
        x_BTD: Tensor = model.advance(still.tokens_B[:, None], still.positions_B[:, None], Mask(), states)
        logits_BTV: Tensor = model.head(x_BTD)
        return logits_BTV[:, 0]

    with torch.no_grad():
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what is made at a first call must not be recorded
            for _ in range(3):
                advance()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits_BV = advance()

    def run(flat: Flat) -> Tensor:
        for name in ("tokens_B", "positions_B", "slots_B", "spans_B"):
            getattr(still, name).copy_(getattr(flat, name))
        for place, table_NC in zip(still.tables_NC, flat.tables_NC, strict=True):
            place.copy_(table_NC)
        graph.replay()
        return logits_BV

    return run


def _filling(stack: Any, size: int, slot: int) -> Flat:
    """A batch of filling tokens only, of a member's slot, in the shapes that a real one has."""
    zeros_B = torch.zeros(4, size, dtype=torch.long, device=stack.device)
    tables = tuple(
        torch.zeros(size, stack.max_pages, dtype=torch.int32, device=stack.device) for _ in stack.pages.groups
    )
    flat = Flat.of([], stack.max_pages, stack.device)
    segments = ((slot, 0, size),) if stack.device.type == "cuda" else ()
    slots_B = torch.full_like(zeros_B[0], slot)
    return Flat(zeros_B[0], zeros_B[1], slots_B, zeros_B[3], flat.segments_N3, tables, segments, ((0, 1),) * size)
