"""Whole models by the book: from the numbers in a checkpoint to logits, without torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ulm.reference.lookup import reference
from ulm.reference.mask import Place, table

Array = NDArray[Any]
Weights = Mapping[str, Array]


def within(weights: Weights, prefix: str) -> dict[str, Array]:
    """The weights of one component, under its own names, in float64."""
    start = f"{prefix}."
    return {name.removeprefix(start): w.astype(np.float64) for name, w in weights.items() if name.startswith(start)}


def layers(spec: Mapping[str, Any]) -> list[tuple[int, Mapping[str, Any]]]:
    """For each layer the number of its block of weights and what it is made of: the pattern again and again."""
    pattern = [entry for entry in spec["blocks"] for _ in range(entry["repeat"])] or [spec]
    numbers = [layer // spec["layers_per_block"] for layer in range(spec["num_layers"])]
    return [(number, pattern[number % len(pattern)]) for number in numbers]


def places(spec: Mapping[str, Any], segments_BT: Array, prefix_tokens_B: Array) -> list[list[Place]]:
    """Where each token of each row stands: tokens are counted from 0, padding stands at the context's end."""
    rows = []
    for segments, prefix in zip(segments_BT.tolist(), prefix_tokens_B.tolist(), strict=True):
        before = np.cumsum([segment >= 0 for segment in segments]) - 1
        rows.append(
            [
                Place(int(position) if segment >= 0 else spec["context_tokens"], segment, prefix)
                for position, segment in zip(before, segments, strict=True)
            ]
        )
    return rows


def decoder(
    tokens_BT: Array,
    weights: Weights,
    spec: Mapping[str, Any],
    segments_BT: Array | None = None,
    prefix_tokens_B: Array | None = None,
) -> Array:
    """logits_BTV of a decoder with its norms before, after, around or at the end of the sub-layers.

    x + f(norm(x)): arXiv 2002.04745, figure 1b; norm(x + f(x)): arXiv 1706.03762, section 3.1; x + norm(f(norm(x))):
    arXiv 2408.00118, section 2.4; x + norm(f(x)): arXiv 2501.00656, section 2. `spec` and `weights` are what a
    checkpoint stores (spec.json, the state dict).
    """
    batch = len(tokens_BT)
    segments_BT = np.zeros_like(tokens_BT) if segments_BT is None else segments_BT
    rows = places(spec, segments_BT, np.zeros(batch, int) if prefix_tokens_B is None else prefix_tokens_B)
    positions_BT = np.array([[place.position for place in row] for row in rows])
    kinds = [*(config["kind"] for config in spec["mask"]), "padding"]
    allowed_BTS = np.array([table(kinds, row, row) for row in rows])

    def part(slot: str, prefix: str, of: Mapping[str, Any] = spec) -> Callable[..., Array]:
        return partial(reference(slot, of[slot]["kind"]), weights=within(weights, prefix), config=of[slot])

    def position_of(of: Mapping[str, Any]) -> Any:
        weights_of_it = within(weights, "position")
        return reference("position", of["position"]["kind"])(weights_of_it, {**spec, "position": of["position"]})

    position = position_of(spec)
    embedding = part("embedding", "embedding")
    x_BTD = position.embed(embedding(tokens_BT), positions_BT)
    if spec["embedding_norm"]:
        x_BTD = part("norm", "embedding_norm")(x_BTD)
    for layer, (number, of) in enumerate(layers(spec)):
        block = f"blocks.{number}"

        def attend(x_BTD: Array, block: str = block, layer: int = layer, of: Mapping[str, Any] = of) -> Array:
            return part("attention", f"{block}.attention", of)(
                x_BTD,
                positions_BT=positions_BT,
                allowed_BTS=allowed_BTS,
                position=position_of(of),
                values_BTJ=embedding(tokens_BT, values_of_layer=layer, num_layers=spec["num_layers"]),
            )

        for name, sub_layer in (
            ("attention", attend),
            ("feedforward", part("feedforward", f"{block}.feedforward", of)),
        ):
            norm = part("norm", f"{block}.{name}_norm", of)
            match of["norm_placement"]:
                case "before":
                    x_BTD = x_BTD + sub_layer(norm(x_BTD))
                case "after":
                    x_BTD = norm(x_BTD + sub_layer(x_BTD))
                case "output":
                    x_BTD = x_BTD + norm(sub_layer(x_BTD))
                case "around":
                    x_BTD = x_BTD + part("norm", f"{block}.{name}_out_norm", of)(sub_layer(norm(x_BTD)))
    head = part("head", "embedding" if spec["embedding"]["tied"] else "head")
    normed_BTD = x_BTD if spec["norm_placement"] == "after" else part("norm", "norm")(x_BTD)
    return head(normed_BTD, vocab_size=spec["vocab_size"])
