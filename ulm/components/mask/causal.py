"""A token sees itself and what came before it."""

from __future__ import annotations

from torch import Tensor

from ulm.components.contracts import Pair
from ulm.registry import KindConfig, register


class Config(KindConfig):
    """Nothing to vary."""


@register("mask", Config)
class CausalMask:
    """position of the key <= position of the query: arXiv 1706.03762, section 3.2.3."""

    is_causal = True

    def __init__(self, config: Config) -> None: ...

    def allowed(self, pair: Pair) -> Tensor | None:
        """Where the key is not later."""
        return pair.k_position <= pair.q_position


CAUSAL_MASK = CausalMask(Config(kind="causal"))
