"""One learned vector per token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ulm.components.contracts import ModelDims
from ulm.registry import KindConfig, register


class Config(KindConfig):
    """`tied`: the same table is the output head (arXiv 1608.05859)."""

    tied: bool = True


@register("embedding", Config)
class TokenEmbedding(nn.Module):
    """x = table[token]. Stored rows are padded to a multiple of 64 for the kernels; ids stay below vocab_size."""

    def __init__(self, config: Config, dims: ModelDims) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(-(-dims.vocab_size // 64) * 64, dims.d_model))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Vectors of tokens, as x_BTD."""
        return nn.functional.embedding(tokens_BT, self.weight)
