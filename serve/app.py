"""The application: engines and gateway deployed on the cluster this process is connected to."""

from __future__ import annotations

import logging
import socket
from typing import Any

import httpx
import ray
from ray import serve as ray_serve
from ray.serve.schema import LoggingConfig

from serve.gateway import Gateway
from serve.member import EngineReplica
from serve.plan import Plan, brings_its_deployment
from ulm import registry
from ulm.errors import ClusterError
from ulm.recipes.serve import ServeRecipe

NAME = "ulm"
READY_TIMEOUT_S = 30.0


def bind(plan: Plan, recipe: ServeRecipe) -> Any:
    """The Serve application of a plan: the gateway, with the shared engine inside or one deployment per group."""
    resources = {"num_cpus": recipe.cpus, "num_gpus": recipe.gpus}
    engines = [_engine(index, names, plan, recipe, resources) for index, names in enumerate(plan.groups)]
    gateway: Any = Gateway
    if None in engines:
        gateway = gateway.options(ray_actor_options=resources)
    return gateway.bind(plan, recipe.engine, *engines)


def _engine(index: int, names: tuple[str, ...], plan: Plan, recipe: ServeRecipe, resources: dict[str, float]) -> Any:
    """The deployment of a group's engine; None for the one that the gateway runs itself."""
    first = plan.members[names[0]]
    if first.engine is None and recipe.members_per_engine is None:
        return None
    config = first.engine or recipe.engine
    if (alone := brings_its_deployment(config)) is not None:
        paths = {name: plan.members[name].checkpoint for name in names}
        return alone.deployment(index, paths, registry.configure("engine", config))
    checkpoints = {name: str(plan.members[name].checkpoint) for name in names}
    replica: Any = EngineReplica  # Serve's decorator is not typed
    return replica.options(name=f"engine-{index}", ray_actor_options=resources).bind(config, checkpoints)


def check_port(host: str, port: int) -> None:
    """ClusterError when the address cannot be listened on: Serve itself would only retry in the background."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ClusterError(
                f"port {port} of {host} cannot be used: {error.strerror}; choose another with --set port={port + 1}"
            ) from None


def up(plan: Plan, recipe: ServeRecipe) -> dict[str, Any]:
    """Deploy and wait until every member is loaded; {"url", "models"}. Ray must be initialised."""
    check_port(recipe.host, recipe.port)
    quiet = LoggingConfig(enable_access_log=False, log_level="WARNING")
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # this process's own share of Serve's log
    ray_serve.start(http_options={"host": recipe.host, "port": recipe.port}, logging_config=quiet)
    try:
        ray_serve.run(bind(plan, recipe), name=NAME, route_prefix="/", logging_config=quiet)
    except RuntimeError as error:  # Serve's own
        raise ClusterError(f"the endpoint did not start: {reason() or error}") from None
    host = f"[{recipe.host}]" if ":" in recipe.host else recipe.host
    host = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)  # noqa: S104  an address to listen on, not to ask
    url = f"http://{host}:{recipe.port}/v1"
    # asked over HTTP: a handle in this process would keep calling the controller while that shuts down
    listed = httpx.get(f"{url}/models", timeout=READY_TIMEOUT_S, trust_env=False).raise_for_status().json()
    return {"url": url, "models": [card["id"] for card in listed["data"]]}


def reason(application: str = NAME) -> str | None:
    """What a replica that could not start said last; Serve's own error only names its deployment."""
    known = ray_serve.status().applications.get(application)
    for deployment in known.deployments.values() if known else ():
        lines = [line for line in deployment.message.splitlines() if line and not line.startswith(" ")]
        if deployment.status == "DEPLOY_FAILED" and lines:
            return str(lines[-1])
    return None


def lacking(plan: Plan, recipe: ServeRecipe) -> str | None:
    """What the cluster has too little of for the engines: Serve would wait for it without a word."""
    wanted = {"CPU": 0.0, "GPU": 0.0}
    for names in plan.groups:
        own = plan.members[names[0]].engine or recipe.engine
        apart = brings_its_deployment(own) is not None
        wanted["CPU"] += own["cpus"] if apart else recipe.cpus
        wanted["GPU"] += own["gpus"] if apart else recipe.gpus
    have = ray.cluster_resources()
    for kind, amount in wanted.items():
        if amount > have.get(kind, 0.0):
            problem = f"the engines ask for {amount:g} {kind}s, and the cluster has {have.get(kind, 0.0):g}"
            return f"{problem}; give engines smaller shares (cpus:, gpus:), or let several members share one"
    return None


def down() -> None:
    """End the application and Serve on this cluster."""
    ray_serve.shutdown()
