"""A larger model of the same kind that costs so many times as much for each token: the control `dense_flops`."""

from __future__ import annotations

import math
from typing import Any

from ulm.errors import ConfigError
from ulm.models.account import forward_flops_per_token, on_meta
from ulm.spec import ModelSpec

TOLERANCE = 0.1  # of the cost asked for
# What a part of cost is worth against a part of shape: 5 % of cost weigh as a width per layer off by a factor of 1.6.
COST_WEIGHT = 10.0


def widened(spec: ModelSpec, times: float) -> ModelSpec:
    """The spec with more width and layers whose forward pass costs `times` as many FLOPs for each token.

    Of those shapes that come near the cost, the one whose width per layer is nearest to the spec's. Heads keep their
    width; their number, and a hidden width that the spec states, grow with d_model. ConfigError where nothing comes
    within a tenth.
    """
    wanted, shape = times * _flops(spec), spec.d_model / spec.num_layers
    found: list[tuple[float, float, ModelSpec]] = []
    for heads in range(spec.num_heads, math.ceil(max(2.0, times) * spec.num_heads) + 1):
        for one in _depths(spec, heads * spec.d_model // spec.num_heads, heads, wanted):
            miss = abs(_flops(one) / wanted - 1)
            cost = COST_WEIGHT * miss + abs(math.log(one.d_model / one.num_layers / shape))
            found.append((cost, miss, one))
    near = [each for each in found if each[1] <= TOLERANCE]
    if not near:
        problem = f"dense_flops: no shape of this model costs {times:g} times as much for each token"
        raise ConfigError("controls", problem, "leave dense_flops out, or a model whose width may grow")
    return min(near, key=lambda each: each[0])[2]


def _depths(spec: ModelSpec, d_model: int, heads: int, wanted: float) -> list[ModelSpec]:
    """Specs of this width whose depths lie around the wanted cost, never shallower than the spec itself."""
    step = spec.layers_per_block
    try:
        one, two = (_scaled(spec, d_model, heads, spec.num_layers + more) for more in (0, step))
    except ConfigError:  # a width that what the spec fixes does not go with
        return []
    slope = _flops(two) - _flops(one)
    steps = max(0, math.floor((wanted - _flops(one)) / slope))
    return [_scaled(spec, d_model, heads, spec.num_layers + step * (steps + more)) for more in (0, 1)]


def _scaled(spec: ModelSpec, d_model: int, heads: int, num_layers: int) -> ModelSpec:
    fields = spec.model_dump(mode="json")
    layers = [fields, *fields["blocks"]]
    for layer in layers:
        _widen(layer, d_model / spec.d_model, heads)
    return ModelSpec.parse({**fields, "d_model": d_model, "num_layers": num_layers})


def _widen(layer: dict[str, Any], by: float, heads: int) -> None:
    """Change what a layer says of its heads and its hidden width, where it says it."""
    attention, feedforward = layer["attention"], layer["feedforward"]
    if (kv_heads := attention.get("num_kv_heads")) is not None:
        wanted = kv_heads * heads / attention["num_heads"]
        divisors = [k for k in range(1, heads + 1) if heads % k == 0]
        attention["num_kv_heads"] = min(divisors, key=lambda k: abs(k - wanted))
    if "num_heads" in attention:
        attention["num_heads"] = heads
    if feedforward.get("d_hidden") is not None:
        feedforward["d_hidden"] = 8 * max(1, round(feedforward["d_hidden"] * by / 8))  # sizes that kernels like


def _flops(spec: ModelSpec) -> float:
    return forward_flops_per_token(on_meta(spec), spec.context_tokens)
