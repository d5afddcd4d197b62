"""Texts that share a row do not see each other."""

from __future__ import annotations

from torch import Tensor

from ulm.components.contracts import Pair
from ulm.registry import KindConfig, register


class Config(KindConfig):
    """Nothing to vary: which text a place belongs to comes with the row."""


@register("mask", Config)
class DocumentMask:
    """Query and key of one text: arXiv 2407.21783 (Llama 3), section 3.2. A row without segments is one text."""

    is_causal = False  # alone it is not; beside `causal` it takes nothing away from it

    def __init__(self, config: Config) -> None: ...

    def allowed(self, pair: Pair) -> Tensor | None:
        """Where the segments are the same."""
        if pair.q_segment is None or pair.k_segment is None:
            return None
        return pair.q_segment == pair.k_segment
