"""Choosing by weight: the experts' posterior for the text so far, as route and mixture use it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from serve.contracts import Member, SwarmContext
from serve.strategies._account import Account, now_s
from serve.strategies._failures import note
from serve.strategies._steps import ask_all
from serve.strategies._windows import Chosen, Text
from ulm.errors import UlmError
from ulm.swarm.manifest import SEED
from ulm.swarm.router import Router
from ulm.swarm.routing import By, chosen, weigh

WEIGHED = "weighed"  # the reason of a call that scores the text


def missing(members: Mapping[str, Member], context: SwarmContext, *, one_vocabulary: bool) -> str | None:
    """What choosing by weight lacks here, or None."""
    if context.router is None or not set(context.router.ids) <= set(members):
        return "a router and its experts"
    if one_vocabulary and len({members[name].tokenizer.digest for name in context.router.ids}) > 1:
        return "one vocabulary for all experts"
    return None


@dataclass
class Weighing:
    """The `choose` of a request. `most` experts answer, or one where it leads by `margin`."""

    context: SwarmContext
    by: By
    most: int
    margin: float = 0.0
    seed: bool = False  # text far from every cluster goes to the member `seed`

    @property
    def router(self) -> Router:
        """The swarm's."""
        assert self.context.router is not None, "a strategy without a router is not offered"
        return self.context.router

    async def __call__(self, text: Text, offered: Mapping[str, Member], account: Account) -> Chosen:
        """See Choose: weights over those experts that are offered."""
        why = "re-routed" if text.generated else "routed"
        reading = self.router.read(text.plain())
        if self.seed and SEED in offered and reading.is_far:
            return Chosen({SEED: 1.0}, "far from every cluster")
        experts = [name for name in self.router.ids if name in offered]
        weight_N = reading.weight_N
        if self.by != "clusterer" and experts:
            nats = await self._nats(text, offered, weight_N, account)
            experts = [name for name in experts if self.context.health.is_up(name)]
            if nats:
                nats_N = np.array([nats.get(name, -np.inf) for name in self.router.ids])
                weight_N, experts = weigh(self.router, weight_N, self.by, nats_N), [n for n in experts if n in nats]
        is_up_N = np.array([name in experts for name in self.router.ids])
        if not experts:
            return Chosen({}, why)
        weight_N = np.where(is_up_N, weight_N, 0.0)
        if not weight_N.sum() > 0:  # of those that are left nobody has a weight
            weight_N = is_up_N.astype(np.float64)
        weight_N = chosen(weight_N / weight_N.sum(), self.most, self.margin)
        return Chosen({m: float(w) for m, w in zip(self.router.ids, weight_N, strict=True) if w > 0}, why)

    async def _nats(
        self, text: Text, offered: Mapping[str, Member], weight_N: np.ndarray, account: Account
    ) -> dict[str, float]:
        """log p_j of the text so far, of each expert that is asked and answers.

        Asking is a call, one an answer and expert. Where the budget has not enough for all and for those that will
        answer, the clusterer's best are asked.
        """
        calls = {call.member: call for call in account.made if call.why == WEIGHED}
        free = account.calls - self.most
        asked = []
        for index in np.argsort(-weight_N, kind="stable"):
            name = self.router.ids[index]
            if name in offered and (name in calls or free >= 1):
                free -= name not in calls
                asked.append(name)
        if len(asked) < len([name for name in self.router.ids if name in offered]):
            account.note(f"weighed by {len(asked)} experts by budget.max_calls")
        if not asked:
            return {}
        tokens = text.tokens_in(offered[asked[0]].tokenizer)  # all experts have one vocabulary
        tokens = tokens[-min(offered[name].context_tokens for name in asked) :]
        if len(tokens) < 2:  # nothing that could be scored
            return {}
        for name in asked:
            if name not in calls:
                calls[name] = account.call(name, len(tokens), WEIGHED)
        started_s = now_s()
        questions = {name: offered[name].engine.score(name, tokens) for name in asked}
        try:
            found, failed = await ask_all(questions, self.context.patience_s)
        finally:
            for name in asked:
                calls[name].ms = round(calls[name].ms + 1e3 * (now_s() - started_s), 3)
        for name, scores in found.items():
            if len(scores) != len(tokens) - 1:
                failed[name] = UlmError(f"gave {len(scores)} scores for {len(tokens)} tokens")
            elif not np.isfinite(scores).all():
                failed[name] = UlmError("gave scores that are no numbers")
        note(failed, account, self.context.health)
        return {name: float(np.sum(scores)) for name, scores in found.items() if name not in failed}
