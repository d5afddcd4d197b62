"""Performer: softmax attention estimated by random features, so the past is one sum of a fixed size."""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor

from ulm.components.attention._kernelised import Kernelised
from ulm.components.attention._projected import HeadsConfig
from ulm.components.contracts import ModelDims, Position
from ulm.registry import register


class Config(HeadsConfig):
    """More features estimate the softmax better; `seed` draws them, in each layer others."""

    num_features: int = Field(64, ge=1, le=2**14)
    seed: int = Field(0, ge=0, lt=2**40)  # a generator has 64 bits, and layers have their share


@register("attention", Config)
class PerformerAttention(Kernelised):
    """exp(q k^T / sqrt(E)) as the mean of exp(w q' - |q'|^2 / 2) exp(w k' - |k'|^2 / 2), x' = x / E^(1/4): FAVOR+.

    arXiv 2009.14794, lemma 1 (positive features) and section 2.4 (orthogonal w). The w are stored with the weights, for
    a generator's numbers may change. Positions turn queries and keys first, as in the softmax that is estimated.
    """

    w_FE: Tensor

    def __init__(self, config: Config, dims: ModelDims, position: Position, layer: int) -> None:
        super().__init__(config, dims, position, layer)
        self.num_features = config.num_features
        generator = torch.Generator(device="cpu").manual_seed(config.seed * 1_000_003 + layer)
        w_FE = orthogonal(config.num_features, dims.head_dim, generator)
        self.register_buffer("w_FE", w_FE.to(torch.get_default_device()))

    def features(self, x_BTHE: Tensor, *, is_query: bool) -> Tensor:
        """exp(w x' - |x'|^2 / 2); a query's largest is made 1, which its norm takes out again.

        Keys have no such scale, for one of all of them would look ahead: theirs is at most exp(|w|^2 / 2), and
        nothing where |k'| is beyond about 13: `qk_norm` keeps them smaller.
        """
        x_BTHE = x_BTHE * x_BTHE.shape[-1] ** -0.25
        powers_BTHF = x_BTHE @ self.w_FE.to(x_BTHE.dtype).T - x_BTHE.square().sum(-1, keepdim=True) / 2
        if is_query:
            powers_BTHF = powers_BTHF - powers_BTHF.amax(-1, keepdim=True).detach()
        return powers_BTHF.exp()

    def attend_flops(self, context_tokens: int) -> float:
        """Forward FLOPs per token beside the matrices: of its sums, and of the products with w, no parameter."""
        of_features = 2.0 * (self.num_heads + self.num_kv_heads) * self.num_features * self.head_dim
        return super().attend_flops(context_tokens) + of_features


def orthogonal(num: int, width: int, generator: torch.Generator) -> Tensor:
    """Normal vectors w_FE whose directions are at right angles within every `width` of them: section 2.4.

    Each has the length of a normal vector of its own.
    """
    blocks = []
    for _ in range(math.ceil(num / width)):
        square = torch.randn(width, width, generator=generator, dtype=torch.float64, device="cpu")
        q, r = torch.linalg.qr(square)
        blocks.append(q * r.diagonal().sign())  # without the signs QR's directions are not uniform
    lengths_F1 = torch.randn(num, width, generator=generator, dtype=torch.float64, device="cpu").norm(
        dim=1, keepdim=True
    )
    return (torch.cat([block.T for block in blocks])[:num] * lengths_F1).float()
