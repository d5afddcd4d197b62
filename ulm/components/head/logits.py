"""From the last layer to one score per token of the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ulm.components.contracts import ModelDims
from ulm.registry import KindConfig, register


class Config(KindConfig):
    """Nothing to vary."""


@register("head", Config)
class LogitsHead(nn.Module):
    """logits = x W^T, cut to the vocabulary. With `tied` the matrix is the embedding table."""

    def __init__(self, config: KindConfig, dims: ModelDims, tied: nn.Parameter | None) -> None:
        super().__init__()
        self.vocab_size = dims.vocab_size
        num_rows = -(-dims.vocab_size // 64) * 64  # as the embedding table's
        self.weight = tied if tied is not None else nn.Parameter(torch.empty(num_rows, dims.d_model))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Scores, as logits_BTV."""
        return self.project(x_BTD)

    def project(self, x_BTD: Tensor) -> Tensor:
        """The product with the matrix; an engine that keeps it in another way puts its own here."""
        return nn.functional.linear(x_BTD, self.weight[: self.vocab_size])
