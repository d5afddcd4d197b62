"""The decoder: embedding, L layers of attention and feed-forward, norm, head."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ulm import registry
from ulm.components.cache import Cache
from ulm.components.contracts import PADDING, Mask, ModelDims, Places
from ulm.components.mask.padding import PADDING_MASK
from ulm.errors import ContextLengthError
from ulm.models.account import num_parameters
from ulm.registry import KindConfig, register
from ulm.spec import LayerSpec, ModelSpec


class Block(nn.Module):
    """One layer: attention, then feed-forward, each added to x, with norms where the spec places them.

    before: x + f(norm(x)) (arXiv 2002.04745); after: norm(x + f(x)) (arXiv 1706.03762, section 3.1);
    around: x + norm(f(norm(x))) (arXiv 2408.00118, section 2.4); output: x + norm(f(x)) (arXiv 2501.00656,
    section 2.1).
    """

    def __init__(self, spec: LayerSpec, dims: ModelDims, position: Any, layer: int) -> None:
        super().__init__()
        self.norm_placement = spec.norm_placement
        norm, attention = registry.find("norm", spec.norm.kind), registry.find("attention", spec.attention.kind)
        self.attention_norm = norm(spec.norm, dims)
        self.attention = attention(spec.attention, dims, position, layer)
        self.feedforward_norm = norm(spec.norm, dims)
        self.feedforward = registry.find("feedforward", spec.feedforward.kind)(spec.feedforward, dims, layer)
        if spec.norm_placement == "around":
            self.attention_out_norm, self.feedforward_out_norm = norm(spec.norm, dims), norm(spec.norm, dims)

    def forward(
        self,
        x_BTD: Tensor,
        positions_BT: Tensor,
        mask: Mask,
        cache: Any = None,
        values_BTJ: Tensor | None = None,
    ) -> Tensor:
        """One layer, as x_BTD."""
        attend = {"positions_BT": positions_BT, "mask": mask, "cache": cache, "values_BTJ": values_BTJ}
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


@register("model", KindConfig)
class Decoder(nn.Module):
    """A causal language model from a spec."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.checkpoint_activations = False  # for training: keep only what stands between layers (arXiv 1604.06174)
        self.dims = ModelDims(
            d_model=spec.d_model,
            num_layers=spec.num_layers,
            vocab_size=spec.vocab_size,
            context_tokens=spec.context_tokens,
            head_dim=spec.head_dim,
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
        )
        norm = registry.find("norm", spec.norm.kind)
        self.masks = tuple(registry.find("mask", config.kind)(config) for config in spec.mask)
        self.embedding = registry.find("embedding", spec.embedding.kind)(spec.embedding, self.dims)
        self.embedding_norm = norm(spec.norm, self.dims) if spec.embedding_norm else nn.Identity()
        self.position = registry.find("position", spec.position.kind)(spec.position, self.dims)
        layers = spec.blocks_of_weights
        # One for all layers that have the same; those of a pattern's own have no weights.
        of_layers = {spec.position: self.position}
        for config in {layer.position: None for layer in layers if layer.position != spec.position}:
            of_layers[config] = registry.find("position", config.kind)(config, self.dims)
        self.positions = {position: config for config, position in of_layers.items()}
        self.blocks = nn.ModuleList(
            Block(layer, self.dims, of_layers[layer.position], number) for number, layer in enumerate(layers)
        )
        # After the last layer's own norm another would do nothing.
        self.norm = nn.Identity() if spec.norm_placement == "after" else norm(spec.norm, self.dims)
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

    @property
    def sees_documents(self) -> bool:
        """Whether it wants to know which text of its row each token belongs to."""
        return any(config.kind == "document" for config in self.spec.mask)

    @property
    def layers(self) -> Sequence[Block]:
        """The blocks in the order in which a token passes them; one that is shared stands several times."""
        return [block for block in self.blocks for _ in range(self.spec.layers_per_block)]  # type: ignore[misc]

    def hidden(
        self, tokens_BT: Tensor, segments_BT: Tensor | None = None, prefix_tokens_B: Tensor | None = None
    ) -> Tensor:
        """The last layer's normed state, before the head, as x_BTD.

        `segments_BT` numbers the texts of each row from 0; -1 is padding, on either side. None: a row is one text.
        """
        self._forget_losses()
        positions_BT, mask = self._look(tokens_BT, segments_BT, prefix_tokens_B)
        x_BTD = self._embed(tokens_BT, positions_BT)
        for number, block in enumerate(self.layers):
            values_BTJ = self.embedding.values(tokens_BT, number)
            if self.checkpoint_activations:
                x_BTD = checkpoint(block, x_BTD, positions_BT, mask, None, values_BTJ, use_reentrant=False)
            else:
                x_BTD = block(x_BTD, positions_BT, mask, None, values_BTJ)
        return self.norm(x_BTD)

    def forward(
        self, tokens_BT: Tensor, segments_BT: Tensor | None = None, prefix_tokens_B: Tensor | None = None
    ) -> Tensor:
        """Scores of the next token at every position, as logits_BTV."""
        return self.head(self.hidden(tokens_BT, segments_BT, prefix_tokens_B))

    def _embed(self, tokens_BT: Tensor, positions_BT: Tensor) -> Tensor:
        return self.embedding_norm(self.position.embed(self.embedding(tokens_BT), positions_BT))

    def _look(
        self, tokens_BT: Tensor, segments_BT: Tensor | None, prefix_tokens_B: Tensor | None
    ) -> tuple[Tensor, Mask]:
        """Where the tokens of whole rows stand, and who may look at whom."""
        if tokens_BT.shape[1] > self.dims.context_tokens:
            problem = f"{tokens_BT.shape[1]} tokens a row, and the model's context is {self.dims.context_tokens}"
            raise ContextLengthError(
                f"{problem}: shorter rows, or a larger context_tokens in the spec", code="context_length_exceeded"
            )
        positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None]
        if segments_BT is None and prefix_tokens_B is None:
            return positions_BT, Mask()
        masks = self.masks
        if segments_BT is not None:
            is_padding_BT = segments_BT == PADDING
            positions_BT = (~is_padding_BT).cumsum(-1) - 1
            positions_BT = positions_BT.masked_fill(is_padding_BT, self.dims.context_tokens)
            masks = (*masks, PADDING_MASK)
        places = Places(positions_BT, positions_BT, segments_BT, segments_BT, prefix_tokens_B)
        return positions_BT, Mask(masks, places).dense()

    def auxiliary_loss(self) -> Tensor | None:
        """What layers add to the training loss for the last `hidden`, per target; told once. None where none does."""
        found = [loss for block in self.blocks for loss in getattr(block.feedforward, "auxiliary_losses", ())]
        self._forget_losses()
        return torch.stack(found).sum() if found else None

    def _forget_losses(self) -> None:
        for block in self.blocks:
            if (losses := getattr(block.feedforward, "auxiliary_losses", None)) is not None:
                losses.clear()

    def new_cache(self, batch: int, max_tokens: int | None = None, prefix_tokens_B: Tensor | None = None) -> Cache:
        """An empty cache for `batch` rows of up to `max_tokens` (the context when None)."""
        size = max_tokens or self.dims.context_tokens
        like = next(self.blocks.parameters())
        states = [block.attention.new_state(batch, size, like) for block in self.layers]
        cache = Cache(states, torch.zeros(batch, dtype=torch.long, device="cpu"), size, like.device)
        cache.prefix_tokens_B = prefix_tokens_B
        return cache

    @torch.no_grad()
    def step(self, tokens_BT: Tensor, cache: Cache, num_new_B: Tensor | None = None) -> Tensor:
        """Continue B rows where the cache ends, as logits_BTV; the cache then holds the new tokens too.

        `num_new_B` says how many of the T tokens of each row count (None: all); logits of the others mean nothing.
        """
        return self.head(self.step_hidden(tokens_BT, cache, num_new_B))

    @torch.no_grad()
    def step_hidden(self, tokens_BT: Tensor, cache: Cache, num_new_B: Tensor | None = None) -> Tensor:
        """The same before the head, as x_BTD."""
        if cache.max_tokens > self.dims.context_tokens:  # positions end with the context
            problem = f"a cache of {cache.max_tokens} tokens a row, of a context of {self.dims.context_tokens}"
            remedy = "a smaller max_tokens for new_cache, or a larger context_tokens in the spec"
            raise ContextLengthError(f"{problem}: {remedy}", code="context_length_exceeded")
        if num_new_B is None:
            num_new_B = torch.full((len(tokens_BT),), tokens_BT.shape[1])
        places = cache.place(num_new_B, tokens_BT.shape[1])
        x_BTD = self.advance(tokens_BT, places.q_positions_BT, Mask(self.masks, places).dense(), cache.layers)
        cache.lengths_B += num_new_B
        return x_BTD

    def advance(self, tokens_BT: Tensor, positions_BT: Tensor, mask: Mask, states: Sequence[Any]) -> Tensor:
        """The last layer's normed state of new tokens, as x_BTD; `states`, one a layer, take the tokens in."""
        x_BTD = self._embed(tokens_BT, positions_BT)
        for number, (block, state) in enumerate(zip(self.layers, states, strict=True)):
            x_BTD = block(x_BTD, positions_BT, mask, state, self.embedding.values(tokens_BT, number))
        return self.norm(x_BTD)


_OUT = re.compile(r"\bout(\.weight)?$")


def build(spec: ModelSpec, *, seed: int | None = None) -> nn.Module:
    """A model with fresh weights: normal, std 0.02, output projections scaled by 1/sqrt(2 layers), no bias (GPT-2).

    `seed` None draws from torch's global generator.
    """
    model: nn.Module = registry.find("model", spec.model)(spec)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                std = 0.02 * ((2 * spec.num_layers) ** -0.5 if _OUT.search(name) else 1.0)
                parameter.normal_(0.0, std, generator=generator)
            elif name.endswith("bias"):
                parameter.zero_()
    return model
