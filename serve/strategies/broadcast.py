"""All members answer, side by side: one choice each."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import replace

from serve.contracts import GenerateRequest, Ledger, Member, SwarmContext, TokenChunk
from serve.strategies._account import Account
from serve.strategies._windows import Drive, in_order, side_by_side
from ulm.errors import RequestError, UnavailableError
from ulm.recipes.serve import Budget
from ulm.registry import KindConfig, register


class Config(KindConfig):
    """`members` that answer; none: all of them."""

    members: tuple[str, ...] = ()


@register("strategy", Config)
class Broadcast:
    """Choice i is the answer of the i-th member, in the order of the ledger's calls."""

    def __init__(self, config: Config) -> None:
        self.members = config.members

    def missing(self, members: Mapping[str, Member], context: SwarmContext) -> str | None:
        """What this strategy lacks here, or None."""
        lacking = [name for name in self.members if name not in members]
        return f"the member {lacking[0]!r}" if lacking else None

    def num_answers(self, members: Mapping[str, Member]) -> int:
        """One a member."""
        return len(self.members or members)

    async def answer(
        self, request: GenerateRequest, members: Mapping[str, Member], context: SwarmContext, budget: Budget
    ) -> AsyncIterator[TokenChunk | Ledger]:
        """Chunks of the answers, the Ledger last. A member that is down gives an empty one, which is marked."""
        if request.num_choices > 1:
            raise RequestError("n: broadcast gives one choice a member; ask without n", param="n")
        account, names = Account("broadcast", budget), list(self.members or members)
        if len(names) > account.calls:
            names = names[: int(account.calls)]
            account.note(f"answered by {len(names)} of {len(self.members or members)} members by budget.max_calls")
        alone = replace(context, fallback=())
        failed: list[UnavailableError] = []
        empty: list[int] = []  # told at the end: where nobody is up there is no answer to begin
        home = next(iter(members))  # in whose vocabulary the prompt is

        async def one(index: int, name: str, share: Account) -> AsyncGenerator[TokenChunk, None]:
            among = {home: members[home], name: members[name]}
            drive = Drive(request, among, alone, share, in_order([name]))
            try:
                async with aclosing(drive.answer(index)) as chunks:
                    async for chunk in chunks:
                        yield chunk
            except UnavailableError as error:
                failed.append(error)
                if len(failed) == len(names):
                    raise
                account.note(f"{name} is not up")
                empty.append(index)

        answers = [
            one(i, name, share) for i, (name, share) in enumerate(zip(names, account.shares(len(names)), strict=True))
        ]
        async with aclosing(side_by_side(answers)) as chunks:
            async for chunk in chunks:
                yield chunk
        for index in empty:
            yield TokenChunk("", (), finish_reason="length", index=index)
        yield account.ledger
