"""The best experts answer together, their probabilities mixed at every token."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping

from pydantic import Field

from serve.contracts import GenerateRequest, Ledger, Member, SwarmContext, TokenChunk
from serve.strategies._ensemble import ensemble, missing
from ulm.recipes.serve import Budget
from ulm.registry import KindConfig, register


class Config(KindConfig):
    """The `top_k` likeliest experts, weighed anew every `every_tokens` generated tokens."""

    top_k: int = Field(2, ge=1)
    every_tokens: int = Field(64, ge=1)


@register("strategy", Config)
class Mixture:
    """p = sum_j w_j p_j over the top k, weights from the router, renormalised."""

    def __init__(self, config: Config) -> None:
        self.top_k, self.every_tokens = config.top_k, config.every_tokens

    def missing(self, members: Mapping[str, Member], context: SwarmContext) -> str | None:
        """What this strategy lacks here, or None."""
        return missing(members, context)

    def answer(
        self, request: GenerateRequest, members: Mapping[str, Member], context: SwarmContext, budget: Budget
    ) -> AsyncIterator[TokenChunk | Ledger]:
        """Chunks of the answer, the Ledger last."""
        return ensemble("mixture", request, members, context, budget, self.top_k, self.every_tokens)
