"""What is deployed for a plan: an engine for each group of members, and the gateways, as Ray Serve has them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.serve.config import BackpressureConfig

from serve import door
from serve.gateway import Gateway
from serve.limits import with_accounts
from serve.member import EngineReplica
from serve.plan import Plan, brings_its_deployment, engine_of
from serve.server import LINGER_S
from ulm import registry
from ulm.checkpoints.manifest import read_manifest
from ulm.recipes.serve import ServeRecipe

NAME = "ulm"
ENGINE = f"{NAME}-engine-"
SPARE = 100  # requests that a gateway takes beyond max_open, so that it refuses them itself
RETRY_AFTER_S = 1.0
END_S = 2.0  # more, for a gateway to close what is idle


def bind(plan: Plan, recipe: ServeRecipe) -> Any:
    """One Serve application of a plan: the gateways, with the shared engine inside or one deployment per group."""
    return gateway_of(plan, recipe, [engine and engine.application() for engine in engines_of(plan, recipe)])


def gateway_of(plan: Plan, recipe: ServeRecipe, engines: Sequence[Any]) -> Any:
    """The gateways over these engines, which are applications or handles; None for the one inside."""
    at_the_door = door.node()
    needs = _resources(recipe) if None in engines else {"num_cpus": 0}
    gateway: Any = Gateway  # Serve's decorator is not typed
    gateway = gateway.options(
        ray_actor_options={**needs, "resources": at_the_door},
        num_replicas=recipe.gateways,
        max_ongoing_requests=recipe.max_open + SPARE,
        max_queued_requests=recipe.max_open + SPARE,  # less would refuse some of a burst that a gateway can take
        backpressure_config=BackpressureConfig(status_code=503, retry_after_s=RETRY_AFTER_S),
        graceful_shutdown_timeout_s=recipe.drain_s + LINGER_S + END_S,
    )
    return gateway.bind(with_accounts(plan, recipe), recipe, bool(at_the_door), *engines)


@dataclass(frozen=True)
class DeployedEngine:
    """An engine to be deployed. Its name says all that it is made of: one of that name need not be started again."""

    name: str
    config: dict[str, Any]
    checkpoints: Mapping[str, Path]  # by member
    number: int
    recipe: ServeRecipe

    def application(self) -> Any:
        """It, as Serve has it."""
        if (alone := brings_its_deployment(self.config)) is not None:
            return alone.deployment(self.number, self.checkpoints, registry.configure("engine", self.config))
        replica: Any = EngineReplica
        replica = replica.options(
            name=f"engine-{self.number}",
            num_replicas=self.recipe.replicas,
            ray_actor_options=_resources(self.recipe),
            graceful_shutdown_timeout_s=self.recipe.drain_s,
        )
        return replica.bind(self.config, {name: str(path) for name, path in self.checkpoints.items()})


def engines_of(plan: Plan, recipe: ServeRecipe) -> list[DeployedEngine | None]:
    """The engine of each group; None for the one inside the gateway."""
    return [_engine(number, names, plan, recipe) for number, names in enumerate(plan.groups)]


def _engine(number: int, names: Sequence[str], plan: Plan, recipe: ServeRecipe) -> DeployedEngine | None:
    config = engine_of(plan.members[names[0]], recipe)
    if config is None:
        return None
    checkpoints = {name: plan.members[name].checkpoint for name in names}
    made_of = {
        "engine": config,
        "members": {name: [str(path), read_manifest(path).digest] for name, path in checkpoints.items()},
        "replicas": [recipe.replicas, recipe.cpus, recipe.gpus, recipe.drain_s],
    }
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    return DeployedEngine(ENGINE + digest[:12], config, checkpoints, number, recipe)


def _resources(recipe: ServeRecipe) -> dict[str, float]:
    return {"num_cpus": recipe.cpus, "num_gpus": recipe.gpus}


def lacking(plan: Plan, recipe: ServeRecipe, running: Collection[str] | None = None) -> str | None:
    """What the cluster has too little of for the engines: Serve would wait for it without a word.

    Of an update `running` are the engines that there are; the others must find room beside them.
    """
    wanted = {"CPU": 0.0, "GPU": 0.0}
    for engine in engines_of(plan, recipe):
        if engine is not None and engine.name in (running or ()):
            continue
        replicas, share = 1, {"cpus": recipe.cpus, "gpus": recipe.gpus}
        if engine is not None and brings_its_deployment(engine.config) is not None:
            share = engine.config
        elif engine is not None:
            replicas = recipe.replicas
        wanted["CPU"] += replicas * share["cpus"]
        wanted["GPU"] += replicas * share["gpus"]
    have = ray.cluster_resources() if running is None else ray.available_resources()
    for kind, amount in wanted.items():
        if amount > have.get(kind, 0.0):
            there = f"the cluster has {have.get(kind, 0.0):g}"
            remedy = "give engines smaller shares (cpus:, gpus:), or let several members share one"
            if running is not None:
                there = f"beside those that answer now {there}"
                remedy += "; or end the endpoint first (`ulm serve down`)"
            return f"the engines ask for {amount:g} {kind}s, and {there}; {remedy}"
    return None
