"""What a ulm model's layers are made of beside attention: feed-forward layers, blocks, the embedding.

Shape letters, as suffixes of tensor names: B batch, T new tokens, S known tokens, D model width, H heads, K key/value
heads, E head width, F pairs of dimensions or features, J K x E, M tokens of all rows, N experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, gelu, relu, silu
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention_ulm import ATTENTIONS, norm_of
from .configuration_ulm import UlmConfig

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": silu,
    "geglu": gelu,
    "gelu": gelu,
    "relu": relu,
    "relu2": lambda x: relu(x).square(),
}


class UlmFeedForward(nn.Module):
    """(act(x W_gate) * x W_up) W_out where it is gated (arXiv 2002.05202), else act(x W_up) W_out."""

    def __init__(self, config: UlmConfig, spec: dict[str, Any]) -> None:
        super().__init__()
        width, self.kind = config.hidden_size, spec["kind"]
        self.is_gated = self.kind.endswith("glu")
        usual = -(-8 * width // (3 * 32)) * 32 if self.is_gated else 4 * width
        d_hidden, has_bias = spec["d_hidden"] or usual, spec.get("bias", False)
        if self.is_gated:
            self.gate = nn.Linear(width, d_hidden, bias=has_bias)
        self.up = nn.Linear(width, d_hidden, bias=has_bias)
        self.out = nn.Linear(d_hidden, width, bias=has_bias)
        self.by_tanh = spec.get("approximate", False)

    def act(self, x: Tensor) -> Tensor:
        """The activation of hidden units."""
        return gelu(x, approximate="tanh") if self.by_tanh else ACTIVATIONS[self.kind](x)

    def forward(self, x: Tensor) -> Tensor:
        """Each token on its own."""
        return self.out(self.act(self.gate(x)) * self.up(x) if self.is_gated else self.act(self.up(x)))


class UlmMixtureOfExperts(nn.Module):
    """sum_e softmax(top-k of x W_router)_e SwiGLU_e(x) (arXiv 2401.04088, section 2.1).

    A single expert is weighed by its probability among all (arXiv 2101.03961, equation 2).
    """

    def __init__(self, config: UlmConfig, spec: dict[str, Any]) -> None:
        super().__init__()
        self.experts_per_token = spec["experts_per_token"]
        self.router = nn.Linear(config.hidden_size, spec["num_experts"], bias=False)
        expert = {"kind": "swiglu", "d_hidden": spec["d_hidden"]}
        self.experts = nn.ModuleList(UlmFeedForward(config, expert) for _ in range(spec["num_experts"]))

    def forward(self, x: Tensor) -> Tensor:
        """Each token on its own."""
        x_MD = x.flatten(0, -2)
        logits_MN = self.router(x_MD).float()
        best, chosen = logits_MN.topk(self.experts_per_token)
        weights = best.softmax(-1) if self.experts_per_token > 1 else logits_MN.softmax(-1).gather(1, chosen)
        weights_MN = torch.zeros_like(logits_MN).scatter(1, chosen, weights).to(x.dtype)
        out_MD = torch.zeros_like(x_MD)
        for number, expert in enumerate(self.experts):
            tokens = weights_MN[:, number].nonzero()[:, 0]
            out_MD = out_MD.index_add(0, tokens, expert(x_MD[tokens]) * weights_MN[tokens, number, None])
        return out_MD.view_as(x)


class UlmBlock(GradientCheckpointingLayer):
    """Attention, then feed-forward, each added to x, with norms where the spec places them.

    before: x + f(norm(x)); after: norm(x + f(x)); around: x + norm(f(norm(x))); output: x + norm(f(x)).
    """

    def __init__(self, config: UlmConfig, spec: dict[str, Any], layer_idx: int) -> None:
        super().__init__()
        self.norm_placement = spec["norm_placement"]
        self.attention_norm = norm_of(spec["norm"], config)
        self.attention = ATTENTIONS[spec["attention"]["kind"]](config, spec["attention"], layer_idx)
        self.feedforward_norm = norm_of(spec["norm"], config)
        feedforward = UlmMixtureOfExperts if spec["feedforward"]["kind"] == "moe" else UlmFeedForward
        self.feedforward = feedforward(config, spec["feedforward"])
        if self.norm_placement == "around":
            self.attention_out_norm = norm_of(spec["norm"], config)
            self.feedforward_out_norm = norm_of(spec["norm"], config)

    def forward(self, x_BTD: Tensor, **attend: Any) -> Tensor:
        """One layer, as x_BTD."""
        match self.norm_placement:
            case "before":
                x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), **attend)
                return x_BTD + self.feedforward(self.feedforward_norm(x_BTD))
            case "after":
                x_BTD = self.attention_norm(x_BTD + self.attention(x_BTD, **attend))
                return self.feedforward_norm(x_BTD + self.feedforward(x_BTD))
            case "output":
                x_BTD = x_BTD + self.attention_norm(self.attention(x_BTD, **attend))
                return x_BTD + self.feedforward_norm(self.feedforward(x_BTD))
            case _:
                x_BTD = x_BTD + self.attention_out_norm(self.attention(self.attention_norm(x_BTD), **attend))
                return x_BTD + self.feedforward_out_norm(self.feedforward(self.feedforward_norm(x_BTD)))


class UlmEmbedding(nn.Embedding):
    """x = weight[token]; for some layers scale * tables[i][token] too, which attention adds to its values.

    The first layers have a table each, and the last ones have the same in reverse (arXiv 2410.17897, section 3).
    """

    def __init__(self, config: UlmConfig, spec: dict[str, Any]) -> None:
        super().__init__(config.vocab_size, config.hidden_size)
        self.scale = config.hidden_size**0.5 if spec["scaled"] else None
        num_tables, num_layers = spec.get("num_tables", 0), config.num_hidden_layers
        near = {layer: min(layer, num_layers - 1 - layer) for layer in range(num_layers)}
        self.table_of = {layer: table for layer, table in near.items() if table < num_tables}
        self.place_of = {layer: place for place, layer in enumerate(self.table_of)}
        if num_tables:
            width = config.num_key_value_heads * config.head_dim
            self.tables = nn.ParameterList([torch.empty(config.vocab_size, width) for _ in range(num_tables)])
            self.scales = nn.Parameter(torch.full((len(self.table_of),), 0.5))

    def forward(self, input: Tensor) -> Tensor:
        """Vectors of tokens, as x_BTD."""
        x_BTD = super().forward(input)
        return x_BTD if self.scale is None else x_BTD * self.scale

    def values(self, tokens_BT: Tensor, layer: int) -> Tensor | None:
        """What is added to a layer's values, as x_BTJ; None for the layers between."""
        if layer not in self.table_of:
            return None
        return embedding(tokens_BT, self.tables[self.table_of[layer]]) * self.scales[self.place_of[layer]]
