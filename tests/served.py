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
