"""The first tokens of a row all see each other; what follows is causal."""

from __future__ import annotations

from torch import Tensor

from ulm.components.contracts import Pair
from ulm.registry import KindConfig, register


class Config(KindConfig):
    """Nothing to vary: how long the prefix of each row is comes with the row."""


@register("mask", Config)
class PrefixMask:
    """key not later than the query, or within the prefix: arXiv 1910.10683, section 3.2.1, "causal with prefix".

    Not causal: the logits of the prefix have seen it whole, so its tokens are no targets.
    """

    is_causal = False

    def __init__(self, config: Config) -> None: ...

    def allowed(self, pair: Pair) -> Tensor | None:
        """Where the key is not later, or among the row's first `prefix_tokens`."""
        causal = pair.k_position <= pair.q_position
        return causal if pair.prefix_tokens is None else causal | (pair.k_position < pair.prefix_tokens)
