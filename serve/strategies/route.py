"""The expert of the text answers: the router's best, chosen again every few tokens."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Literal

from pydantic import Field

from serve.contracts import GenerateRequest, Ledger, Member, SwarmContext, TokenChunk
from serve.strategies._account import Account
from serve.strategies._weighing import Weighing, missing
from serve.strategies._windows import Drive, choices
from ulm.recipes.serve import Budget
from ulm.registry import KindConfig, register


class Config(KindConfig):
    """Every `every_tokens` generated tokens the text is looked at anew.

    Where the best expert's weight leads by less than `margin`, the `top_k` best answer together. Text far from every
    cluster goes to the member `seed`, unless `seed` is false.
    """

    every_tokens: int = Field(64, ge=1)
    margin: float = Field(0.0, ge=0, le=1)
    top_k: int = Field(2, ge=1)
    by: Literal["clusterer", "likelihood", "product"] = "clusterer"
    seed: bool = True


@register("strategy", Config)
class Route:
    """A mixture of the best one: the same cost per token as a single member. Experts may differ in vocabulary."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def missing(self, members: Mapping[str, Member], context: SwarmContext) -> str | None:
        """What this strategy lacks here, or None."""
        needs_one = self.config.margin > 0 or self.config.by != "clusterer"
        return missing(members, context, one_vocabulary=needs_one)

    def answer(
        self, request: GenerateRequest, members: Mapping[str, Member], context: SwarmContext, budget: Budget
    ) -> AsyncIterator[TokenChunk | Ledger]:
        """Chunks of the answer, the Ledger last."""
        config = self.config
        most = config.top_k if config.margin > 0 else 1
        weighing = Weighing(context, config.by, most, config.margin, config.seed)
        return choices(Drive(request, members, context, Account("route", budget), weighing, config.every_tokens))
