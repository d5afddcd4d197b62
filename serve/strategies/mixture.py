"""The best experts answer together, their probabilities mixed at every token."""

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
    """The `top_k` likeliest experts, weighed anew every `every_tokens` generated tokens.

    Weights are `by` the clusterer, by the likelihood that the experts gave the text so far, or by their product.
    """

    top_k: int = Field(2, ge=1)
    every_tokens: int = Field(64, ge=1)
    by: Literal["clusterer", "likelihood", "product"] = "clusterer"


@register("strategy", Config)
class Mixture:
    """p = sum_j w_j p_j over the top k, weights renormalised."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def missing(self, members: Mapping[str, Member], context: SwarmContext) -> str | None:
        """What this strategy lacks here, or None."""
        return missing(members, context, one_vocabulary=True)

    def answer(
        self, request: GenerateRequest, members: Mapping[str, Member], context: SwarmContext, budget: Budget
    ) -> AsyncIterator[TokenChunk | Ledger]:
        """Chunks of the answer, the Ledger last."""
        config = self.config
        weighing = Weighing(context, config.by, config.top_k)
        return choices(Drive(request, members, context, Account("mixture", budget), weighing, config.every_tokens))
