"""Nobody looks at padding."""

from __future__ import annotations

from torch import Tensor

from ulm.components.contracts import PADDING, Pair
from ulm.registry import KindConfig, register


class Config(KindConfig):
    """Nothing to vary. A model puts this kind beside its own wherever a row has padding."""


@register("mask", Config)
class PaddingMask:
    """The key is a token, or query and key are both padding, so that no row of scores is empty and none becomes NaN."""

    is_causal = False

    def __init__(self, config: Config) -> None: ...

    def allowed(self, pair: Pair) -> Tensor | None:
        """Where the key holds a token; padding sees padding."""
        if pair.q_segment is None or pair.k_segment is None:
            return None
        return (pair.k_segment != PADDING) | (pair.q_segment == PADDING)


PADDING_MASK = PaddingMask(Config(kind="padding"))
