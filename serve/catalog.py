"""What the endpoint offers: members by id, strategies by name, and how a request becomes an answer."""

from __future__ import annotations

import reprlib
from collections.abc import AsyncIterator, Container, Mapping
from dataclasses import dataclass
from typing import Any

from serve.contracts import GenerateRequest, Ledger, Member, Strategy, SwarmContext, TokenChunk
from ulm import registry
from ulm.errors import ConfigError, ModelNotFoundError, RequestError, did_you_mean
from ulm.recipes.serve import Budget, Defaults, Limits

SWARM = "swarm"
NONE: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Model:
    """A name that clients ask for, and what answers to it."""

    name: str
    kind: str  # of strategy
    strategy: Strategy
    members: Mapping[str, Member]
    context_tokens: int
    defaults: Defaults = Defaults()

    @property
    def tokenizer(self) -> Any:
        """Its first member's: prompts are read in it, and strategies go on in another where members differ."""
        return next(iter(self.members.values())).tokenizer

    @property
    def num_answers(self) -> int:
        """Answers that it gives at most, where a request asks for one."""
        found: int = self.strategy.num_answers(self.members) if hasattr(self.strategy, "num_answers") else 1
        return found


class Catalog:
    """Names: member ids, `swarm` (the default strategy), `swarm/<kind>` for every strategy that has what it needs."""

    def __init__(
        self,
        members: Mapping[str, Member],
        context: SwarmContext,
        default: Mapping[str, Any],
        budget: Budget,
        limits: Limits = Limits(),  # noqa: B008  frozen
        aliases: Mapping[str, str] = NONE,
        defaults: Mapping[str, Defaults] = NONE,
    ) -> None:
        self.members, self.context, self.budget, self._limits = dict(members), context, budget, limits
        default = within(limits, default)
        self._configs: dict[str, dict[str, Any]] = {SWARM: default}
        for member in self.members:
            self._configs[member] = {"kind": "single", "member": member}
        for kind in registry.kinds("strategy"):
            config = default if kind == default["kind"] else within(limits, {"kind": kind})
            if _strategy(config).missing(self.members, context) is None:
                self._configs[f"{SWARM}/{kind}"] = config
        lacking = _strategy(default).missing(self.members, context)
        if lacking is not None:
            raise ConfigError("strategy", f"{default['kind']} needs {lacking}", "serve a swarm that has it, or single")
        for alias, name in aliases.items():
            if alias in self._configs:
                raise ConfigError(f"aliases.{alias}", "is a model's own name", "another alias")
            if name not in self._configs:
                raise ConfigError(f"aliases.{alias}", f"no model {name!r} is served", did_you_mean(name, self._configs))
        self._aliases = dict(aliases)
        for name in defaults:
            if name not in self._configs and name not in aliases:
                raise ConfigError(f"defaults.{name}", "no such model is served", did_you_mean(name, self._configs))
        self._defaults = dict(defaults)

    def names(self, allowed: Container[str] | None = None) -> list[str]:
        """All model names, the swarm's first, aliases last; of `allowed` models only, where there is such a list."""
        own = sorted(self._configs, key=lambda name: (not name.startswith(SWARM), name))
        return [name for name in (*own, *sorted(self._aliases)) if self._is_allowed(name, allowed)]

    def _is_allowed(self, name: str, allowed: Container[str] | None) -> bool:
        return allowed is None or name in allowed or self._aliases.get(name, name) in allowed

    def model(
        self, name: str, options: Mapping[str, Any] | None = None, allowed: Container[str] | None = None
    ) -> Model:
        """The model of a name, with a request's own `options` (top_k, every_tokens, …) for its strategy.

        RequestError where the strategy has no such option, or where it asks for more than the operator allows. A name
        that is not among those `allowed` is as one that is not served.
        """
        asked, name = name, self._aliases.get(name, name)
        if name not in self._configs or not self._is_allowed(asked, allowed):
            kind, known = asked.removeprefix(f"{SWARM}/"), self.names(allowed)
            why = did_you_mean(asked, known) if known else "this key may use none of those that are served"
            if allowed is None and asked != kind and kind in registry.kinds("strategy"):
                why = f"it needs {_strategy({'kind': kind}).missing(self.members, self.context)}"
            problem = f"The model {reprlib.repr(asked)} does not exist here ({why})"
            raise ModelNotFoundError(problem, param="model", code="model_not_found")
        strategy = self._strategy(self._configs[name], options or {})
        kind = str(self._configs[name]["kind"])
        members = {name: self.members[name]} if name in self.members else self.members
        defaults = self._defaults.get(asked) or self._defaults.get(name) or Defaults()
        return Model(name, kind, strategy, members, min(m.context_tokens for m in members.values()), defaults)

    def _strategy(self, config: Mapping[str, Any], options: Mapping[str, Any]) -> Strategy:
        try:
            strategy = _strategy({**config, **options})
        except ConfigError as error:
            place = error.place.replace("strategy", "ulm", 1)  # the client's name for it
            raise RequestError(f"{place}: {error.problem} for the strategy {config['kind']}", param="ulm") from None
        for field, limit in _beyond(self._limits, options).items():
            problem = f"{options[field]} is beyond this endpoint's limit, which is {limit}"
            raise RequestError(f"ulm.{field}: {problem}", param=f"ulm.{field}")
        lacking = strategy.missing(self.members, self.context) if options else None
        if lacking is not None:
            raise RequestError(f"ulm: these options need {lacking}", param="ulm")
        return strategy

    def budget_of(self, asked: Budget | None) -> Budget:
        """The stricter of the operator's and a request's."""
        return _stricter(self.budget, asked)

    def answer(self, model: Model, request: GenerateRequest, budget: Budget) -> AsyncIterator[TokenChunk | Ledger]:
        """Chunks of an answer, the Ledger last."""
        return model.strategy.answer(request, model.members, self.context, budget)


def _beyond(limits: Limits, config: Mapping[str, Any]) -> dict[str, int]:
    """The fields of a strategy that lie beyond a limit, with that limit."""
    found: dict[str, int] = {}
    top_k, every_tokens = config.get("top_k"), config.get("every_tokens")
    if top_k is not None and limits.max_top_k is not None and top_k > limits.max_top_k:
        found["top_k"] = limits.max_top_k
    if every_tokens is not None and every_tokens < limits.min_every_tokens:
        found["every_tokens"] = limits.min_every_tokens
    return found


def within(limits: Limits, config: Mapping[str, Any]) -> dict[str, Any]:
    """A strategy's config, its defaults moved within the limits; ConfigError where it says itself what is beyond."""
    for field, limit in _beyond(limits, config).items():
        remedy = "another value, or other limits in the recipe"
        raise ConfigError(f"strategy.{field}", f"{config[field]} is beyond the limit {limit}", remedy)
    return {**config, **_beyond(limits, registry.configure("strategy", dict(config)).model_dump())}


def _strategy(config: Mapping[str, Any]) -> Strategy:
    configured = registry.configure("strategy", dict(config))
    strategy: Strategy = registry.find("strategy", configured.kind)(configured)
    return strategy


def _stricter(ours: Budget, theirs: Budget | None) -> Budget:
    if theirs is None:
        return ours
    pairs = {name: (getattr(ours, name), getattr(theirs, name)) for name in Budget.model_fields}
    return Budget(**{n: min((v for v in pair if v is not None), default=None) for n, pair in pairs.items()})
