"""One layer of attention, without the model around it: its passes forward and backward, its decoding, its memory.

`python _one_layer.py KIND NUM_TOKENS THREADS` prints the bytes that a pass takes at most, in a process that did no
other, so that no peak hides another.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor

from ulm import registry, runtime
from ulm.components.cache import Cache
from ulm.components.contracts import Mask, ModelDims

D_MODEL, NUM_HEADS = 256, 8  # heads of 32; 16,384 tokens of dense attention take seconds on two cores
SETTINGS = {"sliding": {"window_tokens": 256}}
WARM_UP_TOKENS = 512  # more than a window, so that what blocks need is there
PASSES_S = 0.3  # short passes are repeated for so long; the median counts
FILL_TOKENS = 512  # that go into a cache at once
STEPS = 60  # that a figure of decoding is the median of


@dataclass
class Layer:
    """A layer with rotary positions and its input: one row of up to `max_tokens`, float32."""

    attention: Any
    x_BTD: Tensor
    positions_BT: Tensor

    @classmethod
    def make(cls, kind: str, max_tokens: int, device: torch.device) -> Self:
        """The kind with what it does by itself, but for SETTINGS; its weights are always the same."""
        torch.manual_seed(0)
        dims = ModelDims(
            d_model=D_MODEL, num_layers=1, vocab_size=2, context_tokens=max_tokens, head_dim=D_MODEL // NUM_HEADS,
            num_heads=NUM_HEADS, num_kv_heads=NUM_HEADS,
        )  # fmt: skip
        rope = registry.find("position", "rope")(registry.configure("position", "rope"), dims)
        heads = {"num_heads": NUM_HEADS, "num_kv_heads": NUM_HEADS}
        config = registry.configure("attention", {"kind": kind, **heads, **SETTINGS.get(kind, {})})
        attention = registry.find("attention", kind)(config, dims, rope, 0).to(device)
        x_BTD = torch.randn(1, max_tokens, D_MODEL, device=device)
        return cls(attention, x_BTD, torch.arange(max_tokens, device=device)[None])

    @property
    def max_tokens(self) -> int:
        """The longest row."""
        return self.x_BTD.shape[1]

    def pass_of(self, num_tokens: int) -> Callable[[], object]:
        """A function that goes forward and backward through the layer, plainly causal, into the input too."""
        x_BTD = self.x_BTD[:, :num_tokens].detach().requires_grad_()
        gradient_BTD = self.x_BTD[:, :num_tokens].flip(1)
        into = [x_BTD, *self.attention.parameters()]

        def once() -> object:
            out_BTD = self.attention(x_BTD, positions_BT=self.positions_BT[:, :num_tokens], mask=Mask())
            return torch.autograd.grad(out_BTD, into, gradient_BTD)

        return once

    def state(self, max_tokens: int) -> Cache:
        """An empty cache of one row."""
        lengths_B = torch.zeros(1, dtype=torch.long)
        return Cache([self.attention.new_state(1, max_tokens, self.x_BTD)], lengths_B, max_tokens, self.x_BTD.device)

    def take(self, num_tokens: int, cache: Cache) -> None:
        """Continue the row by so many tokens, as a decoder's step does."""
        num_new_B = torch.tensor([num_tokens])
        places = cache.place(num_new_B, num_tokens)
        mask, x_BTD = Mask((_CAUSAL,), places).dense(), self.x_BTD[:, :num_tokens]
        self.attention(x_BTD, positions_BT=places.q_positions_BT, mask=mask, cache=cache.layers[0])
        cache.lengths_B += num_new_B

    def decoding_s(self, lengths: list[int]) -> list[float]:
        """Seconds for one token more after each of these numbers of tokens, in rising order."""
        found = []
        with torch.no_grad():
            cache = self.state(self.max_tokens)
            for length in lengths:
                while (missing := length - int(cache.lengths_B)) > 0:
                    self.take(min(missing, FILL_TOKENS), cache)
                self.take(1, cache)
                found.append(statistics.median(seconds(lambda: self.take(1, cache), self.x_BTD) for _ in range(STEPS)))
        return found


_CAUSAL = registry.find("mask", "causal")(registry.configure("mask", "causal"))


def seconds(act: Callable[[], object], like: Tensor) -> float:
    """Seconds that something takes on the device of `like`."""
    if like.is_cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        act()
        end.record()
        torch.cuda.synchronize(like.device)
        return start.elapsed_time(end) / 1e3
    started_s = time.perf_counter()
    act()
    return time.perf_counter() - started_s


def pass_seconds(layer: Layer, num_tokens: int) -> float:
    """Seconds of one pass forward and backward: the median of those that fit into PASSES_S, one at least."""
    act, found = layer.pass_of(num_tokens), [0.0]
    while sum(found) < PASSES_S:
        found.append(seconds(act, layer.x_BTD))
    return statistics.median(found[1:])


def pass_bytes(layer: Layer, num_tokens: int) -> int:
    """The most that a pass adds to what the process, or the CUDA device, holds without it."""
    layer.pass_of(min(WARM_UP_TOKENS, num_tokens))()
    act = layer.pass_of(num_tokens)
    if layer.x_BTD.is_cuda:
        torch.cuda.reset_peak_memory_stats(layer.x_BTD.device)
        before_bytes = torch.cuda.memory_allocated(layer.x_BTD.device)
        act()
        return torch.cuda.max_memory_allocated(layer.x_BTD.device) - before_bytes
    # ru_maxrss begins at what the parent process held when it started this one, and never falls: Linux's own mark does.
    Path("/proc/self/clear_refs").write_text("5")
    before_bytes = runtime.rss_bytes()
    act()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024 - before_bytes


def main() -> None:
    """The peak of one kind at one length."""
    kind, num_tokens, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(threads)
    layer = Layer.make(kind, max(num_tokens, WARM_UP_TOKENS), torch.device("cpu"))
    sys.stdout.write(json.dumps({"peak_bytes": pass_bytes(layer, num_tokens)}) + "\n")


if __name__ == "__main__":
    main()
