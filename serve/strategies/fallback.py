"""The first member of a list that is up answers; where it fails, the next one goes on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping

from serve.contracts import GenerateRequest, Ledger, Member, SwarmContext, TokenChunk
from serve.strategies._account import Account
from serve.strategies._windows import Drive, choices, in_order
from ulm.recipes.serve import Budget
from ulm.registry import KindConfig, register


class Config(KindConfig):
    """`members` in the order in which they are asked; none: all, as the recipe or the swarm lists them."""

    members: tuple[str, ...] = ()


@register("strategy", Config)
class Fallback:
    """An ordered list. What a member that failed has said stays, and the next one continues it."""

    def __init__(self, config: Config) -> None:
        self.members = config.members

    def missing(self, members: Mapping[str, Member], context: SwarmContext) -> str | None:
        """What this strategy lacks here, or None."""
        lacking = [name for name in self.members if name not in members]
        return f"the member {lacking[0]!r}" if lacking else None

    def answer(
        self, request: GenerateRequest, members: Mapping[str, Member], context: SwarmContext, budget: Budget
    ) -> AsyncIterator[TokenChunk | Ledger]:
        """Chunks of the answer, the Ledger last."""
        choose = in_order(self.members or tuple(members))
        return choices(Drive(request, members, context, Account("fallback", budget), choose))
