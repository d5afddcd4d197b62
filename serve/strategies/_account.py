"""What an answer may still spend, and what it did: the budget as a limit, the ledger as its account.

Calls and tokens are counted before they are asked for, so that they are never exceeded. Tokens are those that members
generate: a mixture of k members spends k for each token of the answer. Time is the event loop's.
"""

from __future__ import annotations

import asyncio
import math

from serve.contracts import Call, Ledger
from ulm.recipes.serve import Budget


class Account:
    """The spending of one answer."""

    def __init__(self, strategy: str, budget: Budget) -> None:
        self.ledger = Ledger(strategy, budget=budget)
        self.started_s = now_s()
        self._most_tokens: float = math.inf if budget.max_tokens is None else budget.max_tokens
        self._most_calls: float = math.inf if budget.max_calls is None else budget.max_calls
        self.made: list[Call] = []  # by this share

    def shares(self, number: int) -> list[Account]:
        """Accounts of answers that go on side by side: each may spend an equal part, on the same ledger and clock."""
        made = []
        for index in range(number):
            part = Account(self.ledger.strategy, self.ledger.budget)
            part.ledger, part.started_s = self.ledger, self.started_s
            part._most_tokens, part._most_calls = (_part(most, index, number) for most in (self.tokens, self.calls))
            made.append(part)
        return made

    @property
    def calls(self) -> float:
        """Calls that may still be made."""
        return self._most_calls - len(self.made)

    @property
    def tokens(self) -> float:
        """Tokens that members may still generate."""
        return self._most_tokens - sum(call.tokens_out for call in self.made)

    @property
    def seconds(self) -> float:
        """Time that is left."""
        most_ms = self.ledger.budget.max_ms
        return math.inf if most_ms is None else self.started_s + most_ms / 1e3 - now_s()

    def call(self, member: str, tokens_in: int, why: str) -> Call:
        """A new call, entered before it is made."""
        assert self.calls >= 1, "whoever calls looks first whether another call may be made"
        call = Call(member, tokens_in, why)
        self.made.append(call)
        self.ledger.calls.append(call)
        return call

    def note(self, text: str) -> None:
        """Mark the answer: something was not done as asked."""
        if text not in self.ledger.degraded:
            self.ledger.degraded.append(text)


def _part(most: float, index: int, number: int) -> float:
    """The share of one of `number`; what does not divide goes to the first ones."""
    return most if most == math.inf else most // number + (index < most % number)


def now_s() -> float:
    """The event loop's clock, so that tests can run on a virtual one."""
    return asyncio.get_running_loop().time()
