"""What the endpoint offers: members by id, strategies by name, and how a request becomes an answer."""

from __future__ import annotations

import reprlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from serve.contracts import GenerateRequest, Ledger, Member, Strategy, SwarmContext, TokenChunk
from ulm import registry
from ulm.errors import ConfigError, ModelNotFoundError, RequestError, did_you_mean
from ulm.recipes.serve import Budget

SWARM = "swarm"


@dataclass(frozen=True)
class Model:
    """A name that clients ask for, and what answers to it."""

    name: str
    kind: str  # of strategy
    strategy: Strategy
    members: Mapping[str, Member]
    context_tokens: int

    @property
    def tokenizer(self) -> Any:
        """The one tokenizer of its members."""
        return next(iter(self.members.values())).tokenizer


class Catalog:
    """Names: member ids, `swarm` (the default strategy), `swarm/<kind>` for every strategy that has what it needs."""

    def __init__(
        self, members: Mapping[str, Member], context: SwarmContext, default: Mapping[str, Any], budget: Budget
    ) -> None:
        self.members, self.context, self.budget = dict(members), context, budget
        self._configs: dict[str, dict[str, Any]] = {SWARM: dict(default)}
        for member in self.members:
            self._configs[member] = {"kind": "single", "member": member}
        for kind in registry.kinds("strategy"):
            config = dict(default) if kind == default["kind"] else {"kind": kind}
            if _strategy(config).missing(self.members, context) is None:
                self._configs[f"{SWARM}/{kind}"] = config
        lacking = _strategy(default).missing(self.members, context)
        if lacking is not None:
            raise ConfigError("strategy", f"{default['kind']} needs {lacking}", "serve a swarm that has it, or single")

    def names(self) -> list[str]:
        """All model names, the swarm's first."""
        return sorted(self._configs, key=lambda name: (not name.startswith(SWARM), name))

    def model(self, name: str, options: Mapping[str, Any] | None = None) -> Model:
        """The model of a name, with a request's own `options` (top_k, every_tokens) for its strategy."""
        if name not in self._configs:
            raise ModelNotFoundError(
                f"The model {reprlib.repr(name)} does not exist here ({did_you_mean(name, self._configs)})",
                param="model",
                code="model_not_found",
            )
        try:
            strategy = _strategy({**self._configs[name], **(options or {})})
        except ConfigError as error:
            raise RequestError(f"ulm: {error}", param="ulm") from None
        kind = str(self._configs[name]["kind"])
        members = {name: self.members[name]} if name in self.members else self.members
        return Model(name, kind, strategy, members, min(m.context_tokens for m in members.values()))

    def answer(
        self, model: Model, request: GenerateRequest, budget: Budget | None
    ) -> AsyncIterator[TokenChunk | Ledger]:
        """Chunks of an answer, the Ledger last, under the stricter of the operator's and the request's budget."""
        return model.strategy.answer(request, model.members, self.context, _stricter(self.budget, budget))


def _strategy(config: Mapping[str, Any]) -> Strategy:
    configured = registry.configure("strategy", dict(config))
    strategy: Strategy = registry.find("strategy", configured.kind)(configured)
    return strategy


def _stricter(ours: Budget, theirs: Budget | None) -> Budget:
    if theirs is None:
        return ours
    pairs = {name: (getattr(ours, name), getattr(theirs, name)) for name in Budget.model_fields}
    return Budget(**{n: min((v for v in pair if v is not None), default=None) for n, pair in pairs.items()})
