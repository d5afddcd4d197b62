"""No positions: what a causal mask lets through is all that tells them apart."""

from __future__ import annotations

from torch import Tensor, nn

from ulm.components.contracts import ModelDims
from ulm.registry import KindConfig, register


class Config(KindConfig):
    """Nothing to vary."""


@register("position", Config)
class NoPosition(nn.Module):
    """Everything as it is: arXiv 2305.19466."""

    has_bias = False
    is_of_model = False

    def __init__(self, config: Config, dims: ModelDims) -> None:
        super().__init__()

    def embed(self, x_BTD: Tensor, positions_BT: Tensor) -> Tensor:
        """x as it is."""
        return x_BTD

    def rotate(self, x_BTHE: Tensor, positions_BT: Tensor) -> Tensor:
        """x as it is."""
        return x_BTHE

    def bias(self, positions_BT: Tensor, positions_BS: Tensor) -> Tensor | None:
        """None: nothing is added to the scores."""
        return None
