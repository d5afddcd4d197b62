"""One learned vector per token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ulm.components.contracts import ModelDims
from ulm.registry import KindConfig, register


class Config(KindConfig):
    """`tied`: the same table is the output head (arXiv 1608.05859). `scaled`: vectors times sqrt(d_model)."""

    tied: bool = True
    scaled: bool = False  # arXiv 1706.03762, section 3.4


@register("embedding", Config)
class TokenEmbedding(nn.Module):
    """x = table[token]. Stored rows are padded to a multiple of 64 for the kernels; ids stay below vocab_size."""

    def __init__(self, config: Any, dims: ModelDims) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(-(-dims.vocab_size // 64) * 64, dims.d_model))
        self.scale = dims.d_model**0.5 if config.scaled else None

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Vectors of tokens, as x_BTD."""
        x_BTD = self.look_up(tokens_BT)
        return x_BTD if self.scale is None else x_BTD * self.scale

    def look_up(self, tokens_BT: Tensor) -> Tensor:
        """Rows of the table; an engine that keeps it in another way puts its own here."""
        return nn.functional.embedding(tokens_BT, self.weight)

    def values(self, tokens_BT: Tensor, layer: int) -> Tensor | None:
        """None: attention's values come from the layer's input alone."""
        return None
