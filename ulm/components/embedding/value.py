"""Token embeddings, and more of them that enter the attention's values."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ulm.components.contracts import ModelDims
from ulm.components.embedding.token import TokenEmbedding
from ulm.errors import ConfigError
from ulm.registry import KindConfig, register


class Config(KindConfig):
    """As `token`, with `num_tables` tables of values for the first and as many for the last layers."""

    tied: bool = True
    scaled: bool = False
    num_tables: int = Field(1, ge=1)  # at each end; layer i from the end shares the table of layer i from the start

    def check(self, spec: Any) -> None:
        """ConfigError where there are more tables than layers up to the middle, or values of several widths."""
        most = (spec.num_layers + 1) // 2
        if self.num_tables > most:
            problem = f"{self.num_tables} tables, and {spec.num_layers} layers have use for {most}"
            raise ConfigError("embedding.num_tables", problem, f"at most {most}")
        for number, layer in enumerate(spec.blocks):
            if getattr(layer.attention, "num_kv_heads", 1) != spec.num_kv_heads:
                problem = f"blocks.{number}.attention has other num_kv_heads, and the value embeddings of all layers"
                remedy = "one num_kv_heads, or embedding: token"
                raise ConfigError("embedding.kind", f"{problem} are of one width", remedy)


@register("embedding", Config)
class ValueEmbedding(TokenEmbedding):
    """Beside x = table[token]: attention's values of some layers become v + scale * table_i[token].

    Values of tokens as such, not of what the layers below made of them: arXiv 2410.17897, section 3, with tables in
    place of the first layer's values, shared by the outer layers. Each layer's scale is learned, from 1/2.
    """

    def __init__(self, config: Config, dims: ModelDims) -> None:
        super().__init__(config, dims)
        self.num_tables, self.num_layers = config.num_tables, dims.num_layers
        num_rows, width = self.weight.shape[0], dims.num_kv_heads * dims.head_dim
        self.tables = nn.ParameterList([torch.empty(num_rows, width) for _ in range(config.num_tables)])
        used = [layer for layer in range(dims.num_layers) if self.table_of(layer) is not None]
        self.places = {layer: place for place, layer in enumerate(used)}
        self.scales = nn.Parameter(torch.full((len(used),), 0.5))

    def table_of(self, layer: int) -> int | None:
        """The number of the table that a layer uses, if it uses one."""
        near = min(layer, self.num_layers - 1 - layer)
        return near if near < self.num_tables else None

    def values(self, tokens_BT: Tensor, layer: int) -> Tensor | None:
        """What is added to a layer's values, as x_BTJ with J = K E; None for the layers between."""
        table = self.table_of(layer)
        if table is None:
            return None
        return nn.functional.embedding(tokens_BT, self.tables[table]) * self.scales[self.places[layer]]
