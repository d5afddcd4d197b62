"""Whole models by the book: from the numbers in a checkpoint to logits, without torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ulm.reference.lookup import reference
from ulm.reference.mask import causal

Weights = Mapping[str, NDArray[Any]]


def within(weights: Weights, prefix: str) -> dict[str, NDArray[Any]]:
    """The weights of one component, under its own names, in float64."""
    start = f"{prefix}."
    return {name.removeprefix(start): w.astype(np.float64) for name, w in weights.items() if name.startswith(start)}


def decoder(tokens_BT: NDArray[Any], weights: Weights, spec: Mapping[str, Any]) -> NDArray[Any]:
    """logits_BTV of a pre-norm decoder: x + attention(norm(x)), x + feedforward(norm(x)): arXiv 2002.04745, figure 1b.

    `spec` and `weights` are what a checkpoint stores (spec.json, and the state dict's names).
    """
    batch, num_tokens = tokens_BT.shape
    positions_BT = np.tile(np.arange(num_tokens), (batch, 1))
    allowed_BTS = np.tile(causal(num_tokens, num_tokens), (batch, 1, 1))

    def part(slot: str, prefix: str) -> Callable[..., NDArray[Any]]:
        return partial(reference(slot, spec[slot]["kind"]), weights=within(weights, prefix), config=spec[slot])

    position = reference("position", spec["position"]["kind"])(within(weights, "position"), spec["position"])
    x_BTD = position.embed(part("embedding", "embedding")(tokens_BT), positions_BT)
    for layer in range(spec["num_layers"]):
        block = f"blocks.{layer}"
        normed_BTD = part("norm", f"{block}.attention_norm")(x_BTD)
        x_BTD = x_BTD + part("attention", f"{block}.attention")(
            normed_BTD, positions_BT=positions_BT, allowed_BTS=allowed_BTS, rotate=position.rotate
        )
        normed_BTD = part("norm", f"{block}.feedforward_norm")(x_BTD)
        x_BTD = x_BTD + part("feedforward", f"{block}.feedforward")(normed_BTD)
    head = part("head", "embedding" if spec["embedding"]["tied"] else "head")
    return head(part("norm", "norm")(x_BTD), vocab_size=spec["vocab_size"])
