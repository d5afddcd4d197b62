"""Learned positions: one vector for each, added to the token's."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from ulm.components.contracts import ModelDims
from ulm.registry import KindConfig, register


class Config(KindConfig):
    """`max_tokens` None means the spec's context; a spec always states it, so that it says how long the table is."""

    max_tokens: int | None = Field(None, ge=2, le=2**24)


@register("position", Config)
class LearnedPosition(nn.Module):
    """x + table[position], before the first layer: arXiv 1706.03762, section 3.5, with learned vectors as in GPT-2."""

    has_bias = False
    is_of_model = True

    def __init__(self, config: Config, dims: ModelDims) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.max_tokens or dims.context_tokens, dims.d_model))

    def embed(self, x_BTD: Tensor, positions_BT: Tensor) -> Tensor:
        """x with the vectors of its positions added; padding, one past the end, takes the last."""
        return x_BTD + nn.functional.embedding(positions_BT.clamp_max(len(self.weight) - 1), self.weight)

    def rotate(self, x_BTHE: Tensor, positions_BT: Tensor) -> Tensor:
        """x as it is."""
        return x_BTHE

    def bias(self, positions_BT: Tensor, positions_BS: Tensor) -> Tensor | None:
        """None: the sum is all."""
        return None
