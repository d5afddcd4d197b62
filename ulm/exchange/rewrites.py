"""The same model in other words: settings and weights that an architecture has, for some that it has not.

Each gives settings and weights that compute what those given do; where it has nothing to do it gives them back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ulm import registry
from ulm.components.contracts import ModelDims
from ulm.components.position.rope import Config as RopeConfig
from ulm.exchange.plain import Plain, Turning, by_layer, one
from ulm.exchange.weights import Weights, by_heads

Rewrite = Callable[[Plain, Weights], tuple[Plain, Weights]]
BIASED = ("attention.q", "attention.k", "attention.v", "attention.out", "feedforward.up", "feedforward.out")


def with_biases(settings: Plain, weights: Weights) -> tuple[Plain, Weights]:
    """Biases of zero in all projections and norms that have none."""
    keys = [key for key in settings if key.endswith(".bias")]
    found = dict(weights)
    for name, weight in weights.items():
        stem = name.removesuffix(".weight")
        is_norm = stem.endswith("norm") and not stem.endswith(("q_norm", "k_norm"))
        if stem != name and (stem.endswith(BIASED) or is_norm) and f"{stem}.bias" not in weights:
            found[f"{stem}.bias"] = weight.new_zeros(len(weight))
    return {**settings, **dict.fromkeys(keys, True)}, found


def with_table(settings: Plain, weights: Weights) -> tuple[Plain, Weights]:
    """Sinusoidal positions as a table of learned ones."""
    if settings.get("added_position.kind") != "sinusoidal":
        return settings, weights
    cls = registry.find("position", "sinusoidal")
    dims = ModelDims(
        d_model=settings["d_model"],
        num_layers=settings["num_layers"],
        vocab_size=settings["vocab_size"],
        context_tokens=settings["context_tokens"],
        head_dim=one(settings, "attention.head_dim"),
        num_heads=one(settings, "attention.num_heads"),
        num_kv_heads=one(settings, "attention.num_kv_heads"),
    )
    position: Any = cls(cls.Config(kind="sinusoidal", theta=settings["added_position.theta"]), dims)
    places_BT = torch.arange(settings["context_tokens"])[None]
    table_TD: Tensor = position.embed(torch.zeros(1, settings["context_tokens"], settings["d_model"]), places_BT)[0]
    kept = {key: value for key, value in settings.items() if key != "added_position.theta"}
    return {**kept, "added_position.kind": "learned"}, {**weights, "position.weight": table_TD}


def with_all_heads(settings: Plain, weights: Weights) -> tuple[Plain, Weights]:
    """Keys and values of shared heads once more for each query head that reads them."""
    num_heads, found = one(settings, "attention.num_heads"), dict(weights)
    for layer, num_kv_heads in enumerate(by_layer(settings, "attention.num_kv_heads")):
        for name in (f"blocks.{layer}.attention.{part}" for part in ("k.weight", "v.weight", "k.bias", "v.bias")):
            if num_kv_heads and name in weights:
                heads = by_heads(weights[name], num_kv_heads)
                found[name] = heads.repeat_interleave(num_heads // num_kv_heads, dim=0).flatten(0, 1)
    return {**settings, "attention.num_kv_heads": num_heads}, found


def with_sharper_queries(settings: Plain, weights: Weights) -> tuple[Plain, Weights]:
    """YaRN's factor of queries and keys in the weights of the queries alone, squared: arXiv 2309.00071, section 3.3."""
    found, turnings = dict(weights), by_layer(settings, "position.turning")
    plain: list[Turning | None] = []
    for layer, (turning, width) in enumerate(zip(turnings, by_layer(settings, "attention.head_dim"), strict=True)):
        # Attention by sums has no scores to sharpen, and no width here.
        if turning is None or turning.length == 1 or not isinstance(turning.config, RopeConfig) or width is None:
            plain.append(turning)
            continue
        block = f"blocks.{layer}.attention."
        factors_E = torch.ones(width)
        factors_E[: 2 * len(turning.frequencies)] = turning.length**2
        names = (
            [f"{block}q_norm.weight"] if f"{block}q_norm.weight" in found else [f"{block}q.weight", f"{block}q.bias"]
        )
        for name in names:
            if name in found:
                weight = by_heads(found[name], len(found[name]) // width)
                found[name] = (weight * factors_E.view(1, -1, *[1] * (weight.dim() - 2))).flatten(0, 1)
        scaling = turning.config.scaling
        assert scaling is not None
        config = turning.config.model_copy(update={"scaling": scaling.model_copy(update={"attention_factor": 1.0})})
        plain.append(replace(turning, length=1.0, config=config))
    merged: Any = plain[0] if len(set(plain)) == 1 else tuple(plain)
    return ({**settings, "position.turning": merged} if "position.turning" in settings else settings), found
