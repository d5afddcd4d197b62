"""T5's relative positions: each head learns how it likes each distance, far ones in groups."""

from __future__ import annotations

import math
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ulm.components.contracts import ModelDims
from ulm.errors import ConfigError
from ulm.registry import KindConfig, register


class Config(KindConfig):
    """Half of the buckets hold one distance each, the others ever more of them up to `max_distance`."""

    num_buckets: int = Field(32, ge=2, le=4096)
    max_distance: int = Field(128, ge=2, le=2**20)
    bidirectional: bool = False  # half of the buckets for keys that come later, else those count as distance 0

    @model_validator(mode="after")
    def _even(self) -> Self:
        halves = 4 if self.bidirectional else 2
        if self.num_buckets % halves:
            raise ConfigError(
                "position.num_buckets", f"{self.num_buckets} is no multiple of {halves}", "for example 32"
            )
        if self.max_distance <= self.num_buckets // halves:
            problem = f"{self.max_distance} is not above the {self.num_buckets // halves} distances with a bucket each"
            raise ConfigError("position.max_distance", problem, "for example four times num_buckets")
        return self


@register("position", Config)
class RelativePosition(nn.Module):
    """score + weight[bucket(distance), head], one table for all layers: arXiv 1910.10683, section 2.1.

    Its scores are divided by sqrt(E) like those of all kinds here, where T5 has that in its initial weights.
    """

    has_bias = True
    is_of_model = True
    bucket_S: Tensor

    def __init__(self, config: Config, dims: ModelDims) -> None:
        super().__init__()
        self.bidirectional = config.bidirectional
        self.num_backward = config.num_buckets // 2 if config.bidirectional else config.num_buckets
        self.weight = nn.Parameter(torch.empty(config.num_buckets, dims.num_heads))
        buckets = [
            bucket(distance, self.num_backward, config.max_distance) for distance in range(config.max_distance + 1)
        ]
        self.register_buffer("bucket_S", torch.tensor(buckets), persistent=False)

    def embed(self, x_BTD: Tensor, positions_BT: Tensor) -> Tensor:
        """x as it is."""
        return x_BTD

    def rotate(self, x_BTHE: Tensor, positions_BT: Tensor) -> Tensor:
        """x as it is."""
        return x_BTHE

    def bias(self, positions_BT: Tensor, positions_BS: Tensor) -> Tensor | None:
        """The weight of each pair's bucket, as bias_BHTS."""
        back_BTS = positions_BT[:, :, None] - positions_BS[:, None, :]
        distance_BTS = back_BTS.abs() if self.bidirectional else back_BTS.clamp_min(0)
        buckets_BTS = self.bucket_S[distance_BTS.clamp_max(len(self.bucket_S) - 1)]
        if self.bidirectional:
            buckets_BTS = torch.where(back_BTS < 0, buckets_BTS + self.num_backward, buckets_BTS)
        return self.weight[buckets_BTS].permute(0, 3, 1, 2)


def bucket(distance: int, num_buckets: int, max_distance: int) -> int:
    """The bucket of a distance: itself up to half of them, then by its logarithm, the last from max_distance on."""
    exact = num_buckets // 2
    if distance < exact:
        return distance
    share = math.log(distance / exact) / math.log(max_distance / exact)
    return min(num_buckets - 1, exact + int(share * (num_buckets - exact)))
