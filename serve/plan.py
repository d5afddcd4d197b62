"""What a serve recipe means once its names are looked up: members with their checkpoints, router, strategy, limits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.catalog import within
from ulm.checkpoints import store
from ulm.checkpoints.manifest import read_manifest, verify
from ulm.errors import ConfigError, did_you_mean
from ulm.recipes.serve import PATIENCE_S, Budget, Limits, ServeRecipe
from ulm.swarm.manifest import SEED, Swarm


@dataclass(frozen=True)
class PlannedMember:
    """A member to be loaded."""

    checkpoint: Path
    cluster: int | None = None
    domain: str | None = None


@dataclass(frozen=True)
class Plan:
    """Everything the gateway and the engines need; plain values, so that it travels."""

    members: dict[str, PlannedMember]
    groups: tuple[tuple[str, ...], ...]  # members that share an engine
    strategy: dict[str, Any]
    budget: Budget
    router: Path | None
    swarm: Path | None
    fallback: tuple[str, ...] = ()
    limits: Limits = Limits()
    patience_s: float = PATIENCE_S


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
    size = recipe.members_per_engine or len(members)
    names = list(members)
    if not names:
        raise ConfigError("members", "is empty", "name at least one")
    fallback = recipe.fallback
    if fallback is None:
        fallback = (SEED,) if recipe.swarm is not None and SEED in members else ()
    for number, name in enumerate(fallback):
        if name not in members:
            raise ConfigError(f"fallback.{number}", f"no member {name!r} is served", did_you_mean(name, members))
    within(recipe.limits, strategy)
    groups = tuple(tuple(names[i : i + size]) for i in range(0, len(names), size))
    return Plan(members, groups, strategy, budget, router, folder, fallback, recipe.limits, recipe.patience_s)
