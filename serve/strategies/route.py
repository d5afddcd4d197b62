"""The expert of the text answers: the router's best, chosen again every few tokens."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping

from pydantic import Field

from serve.contracts import GenerateRequest, Ledger, Member, SwarmContext, TokenChunk
from serve.strategies._ensemble import ensemble, missing
from ulm.recipes.serve import Budget
from ulm.registry import KindConfig, register


class Config(KindConfig):
    """`every_tokens` generated tokens the text is looked at anew."""

    every_tokens: int = Field(64, ge=1)


@register("strategy", Config)
class Route:
    """A mixture of the best one: the same cost per token as a single member."""

    def __init__(self, config: Config) -> None:
        self.every_tokens = config.every_tokens

    def missing(self, members: Mapping[str, Member], context: SwarmContext) -> str | None:
        """What this strategy lacks here, or None."""
        return missing(members, context)

    def answer(
        self, request: GenerateRequest, members: Mapping[str, Member], context: SwarmContext, budget: Budget
    ) -> AsyncIterator[TokenChunk | Ledger]:
        """Chunks of the answer, the Ledger last."""
        return ensemble("route", request, members, context, budget, 1, self.every_tokens)
