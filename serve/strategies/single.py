"""One member answers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping

from serve.contracts import GenerateRequest, Ledger, Member, SwarmContext, TokenChunk
from serve.strategies._account import Account
from serve.strategies._windows import Drive, choices, in_order
from ulm.recipes.serve import Budget
from ulm.registry import KindConfig, register


class Config(KindConfig):
    """`member` None is the first one."""

    member: str | None = None


@register("strategy", Config)
class Single:
    """Passes the request to its member; where that is down, to those of the operator's fallback."""

    def __init__(self, config: Config) -> None:
        self.member = config.member

    def missing(self, members: Mapping[str, Member], context: SwarmContext) -> str | None:
        """What this strategy lacks here, or None."""
        return None if (self.member or next(iter(members), None)) in members else f"the member {self.member!r}"

    def answer(
        self, request: GenerateRequest, members: Mapping[str, Member], context: SwarmContext, budget: Budget
    ) -> AsyncIterator[TokenChunk | Ledger]:
        """Chunks of the answer, the Ledger last."""
        choose = in_order([self.member or next(iter(members))])
        return choices(Drive(request, members, context, Account("single", budget), choose))
