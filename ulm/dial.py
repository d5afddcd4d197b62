"""One dial: from a number of parameters to a model's shape and how it is trained. Every rule stands here once.

- **Depth and width**: 64 of width to a layer (nanochat's aspect ratio), as nearly as the number of parameters allows.
- **Heads**: 32 wide below a width of 256, 64 below 2,048, else 128 (as in Llama); half as many of keys and values, or
  the next smaller number that divides them.
- **Feed-forward**: left to the kind's own default, which for swiglu is 8/3 of the width.
- **Context**: twice the width, rounded down to a power of two, from 256 to 2,048 tokens.
- **Learning rate**: 6 / sqrt(parameters), at most 4e-3.
- **Batch**: 8,192 tokens for 1M parameters, growing with parameters^(3/4), rounded down to a power of two, never fewer.

The last three are fitted to the presets (tests/unit/test_dial.py says how closely), whose rates from 125M on are those
of GPT-3 (arXiv 2005.14165, table 2.1). nanochat lets the rate fall with 1 / sqrt(width) and the batch grow with
tokens^0.383, more slowly than here; its smallest models are larger than most of ours.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, cycle, islice
from typing import TYPE_CHECKING, Any

import torch

from ulm import registry
from ulm.errors import ConfigError

if TYPE_CHECKING:  # specs are made with this file
    from ulm.spec import ModelSpec

    Make = Callable[[dict[str, Any]], ModelSpec]

ASPECT = 64
TOLERANCE = 0.1  # of the parameters asked for
# What a part of size is worth against a part of shape: 5 % fewer parameters weigh as an aspect off by a factor of 1.6.
SIZE_WEIGHT = 10.0
FEWEST, MOST = 1e4, 1e10
MOST_SHARED = 8  # layers that may share their weights in a model whose depth is found here
_COUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([kmbt]?)", re.IGNORECASE)
_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}


def lr(parameters: float) -> float:
    """Peak learning rate."""
    return min(4e-3, 6.0 / math.sqrt(parameters))


def batch_tokens(parameters: float) -> int:
    """Tokens of a global batch."""
    return int(8_192 * 2 ** max(0, math.floor(0.75 * math.log2(parameters / 1e6))))


def training_defaults(parameters: float) -> dict[str, Any]:
    """Learning rate and batch under the names that a preset has them by."""
    return {"lr": lr(parameters), "batch_tokens": batch_tokens(parameters)}


def context_tokens(d_model: int) -> int:
    """The longest text that a model is trained on."""
    return int(min(2_048, max(256, 2 ** math.floor(math.log2(2 * d_model)))))


def heads(d_model: int) -> tuple[int, int]:
    """Query heads, and heads of keys and values."""
    num_heads = max(1, d_model // _head_dim(d_model))
    return num_heads, next((k for k in range(num_heads // 2, 1, -1) if num_heads % k == 0), 1)


def parsed(text: str) -> float | None:
    """The number of parameters that 800k, 3.5M or 1B mean, None for another text; ConfigError for an absurd one."""
    found = _COUNT.fullmatch(text.strip())
    if found is None:
        return None
    asked = float(found[1]) * _UNITS[found[2].lower()]
    if not FEWEST <= asked <= MOST:
        raise ConfigError("model.size", f"{text} is no size from 10k to 10B parameters", "for example 800k, 25M or 1B")
    return asked


def fitted(asked: float, make: Make, *, width: Any = None) -> ModelSpec:
    """The spec that comes nearest to `asked` parameters and to the rules.

    `make` lays the fields of a shape under what a recipe fixes; `width` is the d_model that it fixes. ConfigError
    where nothing comes within a tenth of what was asked, as when the table of the vocabulary alone is larger.
    """
    shapes: list[_Shape] = []
    refused: list[ConfigError] = []
    fixed = [width] if isinstance(width, int) and 0 < width <= 2**17 else []  # others a spec refuses
    for heads_to_a_step in (2, 1):  # even numbers of heads first: they leave half as many of keys and values
        for d_model in fixed or _widths(asked, heads_to_a_step):
            try:
                shapes.append(_shape(asked, d_model, make))
            except ConfigError as error:  # a width that what the recipe fixes does not go with
                refused.append(error)
        if near := [shape for shape in shapes if shape.miss <= TOLERANCE]:
            return min(near, key=lambda shape: shape.cost).spec
    if not shapes:
        raise refused[0]
    best = min(shapes, key=lambda shape: shape.miss)
    problem = f"no model of {asked:,.0f} parameters with {best.spec.vocab_size:,} tokens in its vocabulary"
    nearest = f"{best.parameters:,} is the nearest"
    raise ConfigError("model.size", f"{problem}; {nearest}", "another size, or a corpus with a smaller vocabulary")


@dataclass(frozen=True)
class _Shape:
    """A width with the depth that comes nearest to what was asked."""

    spec: ModelSpec
    parameters: int
    asked: float

    @property
    def miss(self) -> float:
        return abs(self.parameters / self.asked - 1)

    @property
    def cost(self) -> float:
        return SIZE_WEIGHT * self.miss + abs(math.log(self.spec.d_model / self.spec.num_layers / ASPECT))


def _shape(asked: float, d_model: int, make: Make) -> _Shape:
    num_heads, num_kv_heads = heads(d_model)
    fields = {
        "d_model": d_model,
        "context_tokens": context_tokens(d_model),
        "attention": {"num_heads": num_heads, "num_kv_heads": num_kv_heads},
    }
    step, specs = _least_depths(fields, make)
    one, two = (_parameters(spec) for spec in specs)
    if specs[0].num_layers == specs[1].num_layers:  # the recipe fixes it
        return _Shape(specs[0], one, asked)
    steps = 1 + round((asked - one) / (two - one))
    most = max(1, d_model // step)  # deeper than wide is no shape
    best = min(max(1, steps), most)
    if not specs[0].blocks:
        return _Shape(make({**fields, "num_layers": step * best}), one + (best - 1) * (two - one), asked)
    totals = list(islice(_totals(specs[0], step), most))
    best = min(range(len(totals)), key=lambda number: abs(totals[number] - asked)) + 1
    return _Shape(make({**fields, "num_layers": step * best}), totals[best - 1], asked)


def _totals(spec: ModelSpec, step: int) -> Iterator[int]:
    """Parameters of models of `step` layers and its multiples, whose blocks differ by a pattern."""
    of_entries, base = [], 0
    for entry in spec.blocks:
        alike = [spec.model_copy(update={"blocks": (entry,), "num_layers": n * step}) for n in (1, 2)]
        one, two = map(_parameters, alike)
        of_entries += [two - one] * entry.repeat
        base = 2 * one - two
    return islice(accumulate(cycle(of_entries), initial=base), 1, None)


def _least_depths(fields: dict[str, Any], make: Make) -> tuple[int, list[ModelSpec]]:
    """The smallest depth that what the recipe fixes goes with, and the specs of it and of twice as much."""
    refused = None
    for step in range(1, MOST_SHARED + 1):
        try:
            return step, [make({**fields, "num_layers": layers}) for layers in (step, 2 * step)]
        except ConfigError as error:
            refused = refused or error
    assert refused is not None
    raise refused


def _parameters(spec: ModelSpec) -> int:
    with torch.device("meta"):
        model = registry.find("model", spec.model)(spec)
    found: int = model.num_parameters
    return found


def _head_dim(d_model: int) -> int:
    return 32 if d_model < 256 else 64 if d_model < 2_048 else 128


def _widths(asked: float, heads_to_a_step: int) -> Iterator[int]:
    """Widths worth a try; below 256 every number of heads is."""
    ideal = (asked * ASPECT / 12) ** (1 / 3)  # layers have about 12 d^2 each; a large vocabulary leaves them little
    wide, wider = heads_to_a_step * _head_dim(256), heads_to_a_step * _head_dim(2_048)
    steps = [*range(32, 256, 32), *range(256, 2_048, wide), *range(2_048, 32_768, wider)]
    return (d_model for d_model in steps if ideal / 16 <= d_model <= 4 * ideal)
