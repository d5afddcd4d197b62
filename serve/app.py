"""The application: engines and gateway deployed on the cluster this process is connected to."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

from ray import serve as ray_serve
from ray.serve.schema import LoggingConfig

from serve.gateway import Gateway
from serve.member import EngineReplica
from serve.plan import Plan, make_plan
from ulm.errors import ClusterError
from ulm.recipes.serve import ServeRecipe

NAME = "ulm"


def bind(plan: Plan, recipe: ServeRecipe) -> Any:
    """The Serve application of a plan: one engine deployment per group of members, and the gateway."""
    engines = [
        EngineReplica.options(
            name=f"engine-{index}", ray_actor_options={"num_cpus": recipe.cpus, "num_gpus": recipe.gpus}
        ).bind(recipe.engine, {name: str(plan.members[name].checkpoint) for name in names})
        for index, names in enumerate(plan.groups)
    ]
    return Gateway.bind(plan, *engines)


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


def up(recipe: ServeRecipe, *, root: Path, near: Path | None) -> dict[str, Any]:
    """Deploy and wait until every member is loaded; {"url", "models"}. Ray must be initialised."""
    plan = make_plan(recipe, root=root, near=near)
    check_port(recipe.host, recipe.port)
    quiet = LoggingConfig(enable_access_log=False, log_level="WARNING")
    ray_serve.start(http_options={"host": recipe.host, "port": recipe.port}, logging_config=quiet)
    try:
        handle = ray_serve.run(bind(plan, recipe), name=NAME, route_prefix="/", logging_config=quiet)
        models = handle.names.remote().result()
    except RuntimeError as error:  # Serve's own: a replica could not start, with the reason in its text
        raise ClusterError(f"the endpoint did not start: {error}") from None
    host = f"[{recipe.host}]" if ":" in recipe.host else recipe.host
    return {"url": f"http://{host}:{recipe.port}/v1", "models": models}


def down() -> None:
    """End the application and Serve on this cluster."""
    ray_serve.shutdown()
