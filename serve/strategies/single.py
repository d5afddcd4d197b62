"""One member answers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import replace

from serve.contracts import GenerateRequest, Ledger, Member, SwarmContext, TokenChunk
from serve.strategies._ensemble import accounted, within
from ulm.recipes.serve import Budget
from ulm.registry import KindConfig, register


class Config(KindConfig):
    """`member` None is the first one."""

    member: str | None = None


@register("strategy", Config)
class Single:
    """Passes the request to its member."""

    def __init__(self, config: Config) -> None:
        self.member = config.member

    def missing(self, members: Mapping[str, Member], context: SwarmContext) -> str | None:
        """What this strategy lacks here, or None."""
        return None if (self.member or next(iter(members), None)) in members else f"the member {self.member!r}"

    async def answer(
        self, request: GenerateRequest, members: Mapping[str, Member], context: SwarmContext, budget: Budget
    ) -> AsyncIterator[TokenChunk | Ledger]:
        """Chunks of the answer, the Ledger last."""
        member = members[self.member or next(iter(members))]
        ledger = Ledger("single", budget=budget)
        request = within(replace(request, weights={member.id: 1.0}), budget, 1, ledger)
        async with aclosing(accounted(member.engine.generate(request), ledger)) as reported:  # type: ignore[type-var]
            async for chunk in reported:
                yield chunk
        yield ledger
