"""What a serve recipe means once its names are looked up: members with their checkpoints, router, strategy, limits."""

from __future__ import annotations

import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from serve.accounts import check_state
from serve.catalog import Catalog, within
from serve.contracts import Engine, Member, SwarmContext
from ulm import registry
from ulm.artefacts import check_path
from ulm.checkpoints import store
from ulm.checkpoints.manifest import read_manifest, verify
from ulm.errors import ConfigError, did_you_mean
from ulm.recipes.base import resolve_path
from ulm.recipes.serve import PATIENCE_S, Budget, Defaults, Limits, ServeRecipe
from ulm.swarm.manifest import SEED, Swarm
from ulm.swarm.router import Router
from ulm.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True)
class PlannedMember:
    """A member to be loaded."""

    checkpoint: Path
    cluster: int | None = None
    domain: str | None = None
    engine: dict[str, Any] | None = None  # that it has to itself; None: the recipe's
    context_tokens: int | None = None  # that its engine allows; None: the model's


@dataclass(frozen=True)
class Plan:
    """Everything the gateway and the engines need; plain values, so that it travels."""

    members: dict[str, PlannedMember]
    groups: tuple[tuple[str, ...], ...]  # members that share an engine, then those that have one to themselves
    strategy: dict[str, Any]
    budget: Budget
    router: Path | None
    swarm: Path | None
    fallback: tuple[str, ...] = ()
    limits: Limits = Limits()
    patience_s: float = PATIENCE_S
    aliases: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Defaults] = field(default_factory=dict)
    accounts: str | None = None  # the name of the actor that checks keys, once it runs; see serve/limits.py
    request_log: Path | None = None
    tls: tuple[Path, Path] | None = None  # certificate and key


def _verified(checkpoint: Path) -> Path:
    """The checkpoint, every byte read: damage is said here, before processes are started that would stumble over it."""
    manifest = read_manifest(checkpoint)
    verify(checkpoint, manifest, *manifest.files)
    return checkpoint


def make_plan(recipe: ServeRecipe, *, root: Path, near: Path | None) -> Plan:
    """Look up what the recipe names; ConfigError or ArtefactError where something is missing or damaged."""
    router: Path | None = None
    if recipe.swarm is not None:
        swarm = Swarm.open(recipe.swarm, root=root, near=near)
        members = {
            name: PlannedMember(swarm.checkpoint(name), entry.cluster, entry.domain)
            for name, entry in swarm.members.items()
        }
        router, folder = swarm.router_folder(), swarm.folder
        strategy = recipe.strategy or swarm.manifest.strategy
        budget = recipe.budget if recipe.budget != Budget() else swarm.manifest.budget
    else:
        members = {
            name: PlannedMember(
                _verified(store.resolve(member.checkpoint, root=root, near=near, place=f"members.{name}.checkpoint"))
            )
            for name, member in recipe.members.items()
        }
        folder, strategy, budget = None, recipe.strategy or {"kind": "single"}, recipe.budget
    if not members:
        raise ConfigError("members", "is empty", "name at least one")
    members, groups = _with_engines(recipe, members, root)
    fallback = recipe.fallback
    if fallback is None:
        fallback = (SEED,) if recipe.swarm is not None and SEED in members else ()
    for number, name in enumerate(fallback):
        if name not in members:
            raise ConfigError(f"fallback.{number}", f"no member {name!r} is served", did_you_mean(name, members))
    within(recipe.limits, strategy)
    plan = Plan(
        members,
        groups,
        strategy,
        budget,
        router,
        folder,
        fallback,
        recipe.limits,
        recipe.patience_s,
        recipe.aliases,
        recipe.defaults,
        request_log=_log_path(recipe, root),
        tls=_tls(recipe, root, near),
    )
    if recipe.keys:
        check_state(recipe, root)
    nobody: Any = None
    catalog_of(plan, dict.fromkeys(members, nobody))  # what is wrong with it is said here, before processes start
    return plan


def _log_path(recipe: ServeRecipe, root: Path) -> Path | None:
    if recipe.request_log is None:
        return None
    check_path(recipe.request_log, "request_log")
    return root / recipe.request_log


def _tls(recipe: ServeRecipe, root: Path, near: Path | None) -> tuple[Path, Path] | None:
    """The files of a certificate and its key; ConfigError where they are not there or do not belong together."""
    if recipe.tls is None:
        return None
    certificate, key = (
        resolve_path(getattr(recipe.tls, name), near=near, root=root, place=f"tls.{name}").absolute()
        for name in ("certificate", "key")
    )
    for name, path in (("certificate", certificate), ("key", key)):
        if path.exists() and not path.is_file():  # of a pipe, OpenSSL would wait for what nobody writes
            raise ConfigError(f"tls.{name}", f"{path} is no file", "the path of a PEM file")
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key, password=_no_password)
    except (OSError, ssl.SSLError) as error:
        problem = f"{certificate} and {key} cannot be used: {error.strerror or error}"
        raise ConfigError("tls", problem, "a certificate and its key without a password, as PEM files") from None
    return certificate, key


def _no_password() -> str:
    """Asked for where a key has one, which OpenSSL would else ask the terminal for."""
    return ""


def catalog_of(plan: Plan, engines: Mapping[str, Engine]) -> Catalog:
    """What the endpoint offers, by the engine of each member. ConfigError where a strategy or a name leads nowhere."""
    members = {}
    for name, planned in plan.members.items():
        context_tokens = planned.context_tokens or store.read_spec(planned.checkpoint).context_tokens
        tokenizer = Tokenizer.read(planned.checkpoint)
        members[name] = Member(name, engines[name], tokenizer, context_tokens, planned.cluster, planned.domain)
    router = Router.load(plan.router) if plan.router else None
    context = SwarmContext(router, plan.fallback, patience_s=plan.patience_s)
    return Catalog(members, context, plan.strategy, plan.budget, plan.limits, plan.aliases, plan.defaults)


def _with_engines(
    recipe: ServeRecipe, members: dict[str, PlannedMember], root: Path
) -> tuple[dict[str, PlannedMember], tuple[tuple[str, ...], ...]]:
    """The members with their engines, and which share one; ConfigError for what has no effect or cannot be."""
    own = recipe.own_engines()
    for name in recipe.engines:
        if name not in members:
            raise ConfigError(f"engines.{name}", f"no member {name!r} is served", did_you_mean(name, members))
    shared = [name for name in members if name not in own]
    usual = brings_its_deployment(recipe.engine)
    idle = ["cpus", "gpus"] if usual is not None or not shared else []
    for name in idle if shared else [*idle, "members_per_engine"]:
        if name in recipe.model_fields_set:
            problem = "has no effect: every member has an engine with settings of its own"
            raise ConfigError(name, problem, "leave it out; the engine has its own settings")
    size = recipe.members_per_engine or (1 if usual is not None else len(shared) or 1)
    groups = [tuple(shared[i : i + size]) for i in range(0, len(shared), size)]
    found = {name: replace(member, engine=own[name][1]) if name in own else member for name, member in members.items()}
    for names in [*(groups if usual is not None else []), *((name,) for name in own)]:
        place, engine = own.get(names[0], ("engine", recipe.engine))
        if (cls := brings_its_deployment(engine)) is not None:
            checkpoints = {name: members[name].checkpoint for name in names}
            config = cls.settled(registry.configure("engine", engine), checkpoints, root, place)
            for name in names:
                changes = {"engine": config.model_dump(), "context_tokens": config.context_tokens}
                found[name] = replace(members[name], **changes)
    groups = [*groups, *((name,) for name in members if name in own)]
    _check_replicas(recipe, [engine_of(found[names[0]], recipe) for names in groups])
    return found, tuple(groups)


def engine_of(first: PlannedMember, recipe: ServeRecipe) -> dict[str, Any] | None:
    """The settings of a group's engine, by its first member; None for the one inside the gateway."""
    is_inside = first.engine is None and recipe.members_per_engine is None
    return None if is_inside else first.engine or recipe.engine


def _check_replicas(recipe: ServeRecipe, engines: Sequence[dict[str, Any] | None]) -> None:
    """ConfigError for replicas that cannot be, or that would be nobody's."""
    remedy = "members_per_engine: 8, say, gives engines processes of their own"
    if recipe.gateways > 1 and None in engines:
        raise ConfigError("gateways", f"{recipe.gateways} of them cannot share the engine inside the gateway", remedy)
    if recipe.replicas > 1 and all(engine is None or brings_its_deployment(engine) for engine in engines):
        problem = "has no effect: the engine is inside the gateway"
        if None not in engines:
            problem, remedy = "has no effect: every engine has replicas of its own", "max_replicas of the engines"
        raise ConfigError("replicas", problem, remedy)


def brings_its_deployment(engine: dict[str, Any]) -> Any:
    """The class of an engine that runs in a deployment that it brings itself; None of any other."""
    cls = registry.find("engine", engine["kind"])
    return cls if hasattr(cls, "deployment") else None
