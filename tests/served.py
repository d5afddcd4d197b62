"""The endpoint as `ulm serve up` deploys it, in a Ray cluster of this process."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ulm.recipes import ServeRecipe
from ulm.recipes.base import validate


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def endpoint(**fields: Any) -> Iterator[dict[str, Any]]:
    """{"url", "models"} of a recipe with these fields, on a port of its own, until the block ends."""
    import ray

    from serve import app
    from serve.plan import make_plan

    recipe = validate(ServeRecipe, {"name": "t", "port": free_port(), **fields})
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    try:
        yield app.up(make_plan(recipe, root=Path("unused"), near=None), recipe)
    finally:
        app.down()
        ray.shutdown()


def engine_handle(number: int = 0) -> Any:
    """A handle of an engine of the endpoint that this process's cluster has, by its place among the recipe's."""
    from ray import serve as ray_serve

    deployments = {
        deployment: name for name, known in ray_serve.status().applications.items() for deployment in known.deployments
    }
    return ray_serve.get_app_handle(deployments[f"engine-{number}"])


def replica_processes() -> list[dict[str, str]]:
    """The actors of the first engine whose processes are there."""
    import ray

    return [actor for actor in ray.util.list_named_actors(all_namespaces=True) if "#engine-0#" in actor["name"]]


def num_running_replicas() -> int:
    """Replicas of the first engine that Serve calls up and that are: the end of one is noticed after seconds."""
    from ray import serve as ray_serve

    applications = ray_serve.status().applications.values()
    (engine,) = (known for a in applications for name, known in a.deployments.items() if name == "engine-0")
    return min(len(replica_processes()), int(engine.replica_states.get("RUNNING", 0)))
