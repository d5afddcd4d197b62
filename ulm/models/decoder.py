"""The decoder: embedding, L blocks of attention and feed-forward, norm, head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ulm import registry
from ulm.components.cache import Cache, LayerCache
from ulm.components.contracts import Mask, ModelDims
from ulm.models.account import num_parameters
from ulm.registry import KindConfig, register
from ulm.spec import ModelSpec


class Block(nn.Module):
    """x + attention(norm(x)), then x + feedforward(norm(x)): norms before the sub-layers (arXiv 2002.04745)."""

    def __init__(self, spec: ModelSpec, dims: ModelDims, position: Any, layer: int) -> None:
        super().__init__()
        self.attention_norm = registry.find("norm", spec.norm.kind)(spec.norm, dims)
        self.attention = registry.find("attention", spec.attention.kind)(spec.attention, dims, position, layer)
        self.feedforward_norm = registry.find("norm", spec.norm.kind)(spec.norm, dims)
        self.feedforward = registry.find("feedforward", spec.feedforward.kind)(spec.feedforward, dims, layer)

    def forward(
        self, x_BTD: Tensor, positions_BT: Tensor, mask: Mask, cache: LayerCache | None = None, num_known: int = 0
    ) -> Tensor:
        """One layer, as x_BTD."""
        x_BTD = x_BTD + self.attention(
            self.attention_norm(x_BTD), positions_BT=positions_BT, mask=mask, cache=cache, num_known=num_known
        )
        return x_BTD + self.feedforward(self.feedforward_norm(x_BTD))


@register("model", KindConfig)
class Decoder(nn.Module):
    """A causal language model from a spec."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.checkpoint_activations = False  # for training: keep only what stands between blocks (arXiv 1604.06174)
        self.dims = ModelDims(spec.d_model, spec.num_layers, spec.vocab_size, spec.context_tokens, spec.head_dim)
        self.embedding = registry.find("embedding", spec.embedding.kind)(spec.embedding, self.dims)
        self.position = registry.find("position", spec.position.kind)(spec.position, self.dims)  # shared by all layers
        self.blocks = nn.ModuleList(Block(spec, self.dims, self.position, layer) for layer in range(spec.num_layers))
        self.norm = registry.find("norm", spec.norm.kind)(spec.norm, self.dims)
        tied = self.embedding.weight if getattr(spec.embedding, "tied", False) else None
        self.head = registry.find("head", spec.head.kind)(spec.head, self.dims, tied)

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return self.dims.vocab_size

    @property
    def num_parameters(self) -> int:
        """All parameters at the true vocabulary: what a size such as 25M is fitted by."""
        return num_parameters(self)

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """The last layer's normed state, before the head, as x_BTD."""
        positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None]
        x_BTD = self.position.embed(self.embedding(tokens_BT), positions_BT)
        for block in self.blocks:
            if self.checkpoint_activations:
                x_BTD = checkpoint(block, x_BTD, positions_BT, Mask(), use_reentrant=False)
            else:
                x_BTD = block(x_BTD, positions_BT, Mask())
        return self.norm(x_BTD)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Scores of the next token at every position, as logits_BTV."""
        return self.head(self.hidden(tokens_BT))

    def new_cache(self, batch: int, max_tokens: int | None = None) -> Cache:
        """An empty KV cache for `batch` rows of up to `max_tokens` (the context when None)."""
        heads = getattr(self.spec.attention, "num_kv_heads", 1)
        size = max_tokens or self.dims.context_tokens
        like = next(self.blocks.parameters())
        return Cache.empty(self.dims.num_layers, batch, size, heads, self.dims.head_dim, like=like)

    @torch.no_grad()
    def step(self, tokens_BT: Tensor, cache: Cache, num_new_B: Tensor | None = None) -> Tensor:
        """Continue B rows where the cache ends, as logits_BTV; the cache then holds the new tokens too.

        `num_new_B` says how many of the T tokens of each row count (None: all); logits of the others mean nothing.
        """
        if num_new_B is None:
            num_new_B = torch.full((len(tokens_BT),), tokens_BT.shape[1])
        positions_BT, mask, num_known = cache.place(num_new_B, tokens_BT.shape[1])
        x_BTD = self.position.embed(self.embedding(tokens_BT), positions_BT)
        for block, layer_cache in zip(self.blocks, cache.layers, strict=True):
            x_BTD = block(x_BTD, positions_BT, mask, layer_cache, num_known)
        cache.lengths_B += num_new_B
        return self.head(self.norm(x_BTD))


def build(spec: ModelSpec, *, seed: int | None = None) -> nn.Module:
    """A model with fresh weights: normal, std 0.02, output projections scaled by 1/sqrt(2 layers) (GPT-2).

    `seed` None draws from torch's global generator.
    """
    model: nn.Module = registry.find("model", spec.model)(spec)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                std = 0.02 * ((2 * spec.num_layers) ** -0.5 if name.endswith("out.weight") else 1.0)
                parameter.normal_(0.0, std, generator=generator)
    return model
