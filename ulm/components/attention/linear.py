"""Linear attention: scores are products of positive features, so the past is one sum of a fixed size."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import elu

from ulm.components.attention._kernelised import Kernelised
from ulm.components.attention._projected import HeadsConfig
from ulm.components.contracts import ModelDims, Position
from ulm.registry import register


class Config(HeadsConfig):
    """Heads alone."""


@register("attention", Config)
class LinearAttention(Kernelised):
    """phi(x) = elu(x) + 1: arXiv 2006.16236, equation 7.

    A position that turns, turns the features of the numerator and not those of the norm: arXiv 2104.09864, equation 19.
    """

    turns_features = True

    def __init__(self, config: Config, dims: ModelDims, position: Position, layer: int) -> None:
        super().__init__(config, dims, position, layer)
        self.num_features = dims.head_dim

    def features(self, x_BTHE: Tensor, *, is_query: bool) -> Tensor:
        """elu(x) + 1, the same of queries and keys."""
        return elu(x_BTHE) + 1
