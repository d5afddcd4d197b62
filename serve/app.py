"""The endpoint on the cluster this process is connected to: how it comes, changes and goes.

Each engine is a Serve application, and so are the gateways: an engine outlives a change that does not touch it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import httpx
from ray import serve as ray_serve
from ray.serve.schema import LoggingConfig

from serve import door, limits
from serve.graph import ENGINE, NAME, bind, engines_of, gateway_of
from serve.plan import Plan, catalog_of, make_plan
from ulm import runtime
from ulm.certificates import trusting
from ulm.errors import ClusterError, ConfigError
from ulm.recipes.base import load, validate
from ulm.recipes.serve import ServeRecipe

ANY_ADDRESS = "0.0.0.0"  # noqa: S104  where a config file of Serve may have it listen
READY_TIMEOUT_S = 30.0
LOOK_EVERY_S = 0.1
QUIET = LoggingConfig(enable_access_log=False, log_level="WARNING")


def from_recipe(args: dict[str, Any]) -> Any:
    """The application for Serve's config files: `import_path: serve.app:from_recipe`, `args: {recipe: …}`.

    `recipe` is the path of one, or what would stand in it. Where to listen is for the file's http_options to say, so
    the recipe is held to what one for any address has to say of keys.
    """
    given = args.get("recipe")
    if set(args) != {"recipe"} or not isinstance(given, str | dict):
        raise ConfigError("args", f"has {', '.join(map(str, args)) or 'nothing'}", "{recipe: a path, or a mapping}")
    if isinstance(given, str):
        recipe, near = load(ServeRecipe, Path(given), [f"host={ANY_ADDRESS}"]), Path(given).parent
    else:
        recipe, near = validate(ServeRecipe, {"name": NAME, **given, "host": ANY_ADDRESS}), None
    if recipe.tls is not None:
        raise ConfigError("tls", "has no effect here", "http_options: {ssl_certfile: …, ssl_keyfile: …} beside it")
    return bind(make_plan(recipe, root=runtime.root(), near=near), recipe)


def up(plan: Plan, recipe: ServeRecipe) -> dict[str, Any]:
    """Deploy and wait until every member is loaded; {"url", "models"}. Ray must be initialised."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # this process's own share of Serve's log
    door.open_(recipe.host, recipe.port)
    ray_serve.start(proxy_location="Disabled", logging_config=QUIET)
    engines = _new_engines(plan, recipe)
    _start(engines)
    _start(_gateways(plan, recipe))
    _wait({*engines, NAME})
    return _answering(plan, recipe)


def update(plan: Plan, recipe: ServeRecipe) -> dict[str, Any]:
    """Have another plan answer at the same address, without a moment in which nobody does; as `up`.

    Its engines come first, then its gateways; then the old ones finish what they have and go. ClusterError where it
    cannot be: then all is as it was.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    there, engines = running(), _new_engines(plan, recipe)
    before = ray_serve.get_app_handle(NAME).serves.remote().result(timeout_s=READY_TIMEOUT_S)
    has_begun = False
    try:
        _start(engines)
        _wait(engines)
        has_begun = True
        _start(_gateways(plan, recipe))
        _wait({NAME})
    except BaseException:
        if has_begun:
            _start(_gateways(*before))
            _wait({NAME})
        _delete(engines)
        raise
    _delete(there - {NAME} - {engine.name for engine in engines_of(plan, recipe) if engine is not None})
    return _answering(plan, recipe)


def _new_engines(plan: Plan, recipe: ServeRecipe) -> dict[str, Any]:
    """The applications of engines that are not there yet."""
    there = running()
    engines = [engine for engine in engines_of(plan, recipe) if engine is not None and engine.name not in there]
    return {engine.name: engine.application() for engine in engines}


def _gateways(plan: Plan, recipe: ServeRecipe) -> dict[str, Any]:
    """The application of the gateways; those of its engines have been started."""
    engines = [engine and ray_serve.get_app_handle(engine.name) for engine in engines_of(plan, recipe)]
    return {NAME: gateway_of(plan, recipe, engines)}


def _start(applications: Mapping[str, Any]) -> None:
    """Start these side by side, each in place of one of its name."""
    targets = [
        ray_serve.RunTarget(application, name, "/" if name == NAME else None, QUIET)
        for name, application in applications.items()
    ]
    if targets:
        ray_serve.run_many(targets, wait_for_applications_running=False)


def _wait(names: Collection[str]) -> None:
    """Return once all of these run; ClusterError with the reason where one cannot."""
    while True:
        known = ray_serve.status().applications
        for name in names:
            if known[name].status == "DEPLOY_FAILED":
                raise ClusterError(f"the endpoint did not start: {reason(name) or known[name].message}")
        if all(known[name].status == "RUNNING" for name in names):
            return
        time.sleep(LOOK_EVERY_S)


def running() -> set[str]:
    """The applications of an endpoint that are there."""
    known = ray_serve.status().applications
    return {
        name
        for name, application in known.items()
        if (name == NAME or name.startswith(ENGINE)) and application.status in ("RUNNING", "UNHEALTHY")
    }


def _delete(names: Collection[str]) -> None:
    """End applications, and wait until they are gone: each finishes what it has, in the time it was given."""
    for name in names:
        ray_serve.delete(name, _blocking=False)
    while any(name in ray_serve.status().applications for name in names):
        time.sleep(LOOK_EVERY_S)


def url_of(recipe: ServeRecipe) -> str:
    """Where a recipe's endpoint is asked."""
    host = f"[{recipe.host}]" if ":" in recipe.host else recipe.host
    host = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)  # noqa: S104  an address to listen on, not to ask
    return f"{'https' if recipe.tls else 'http'}://{host}:{recipe.port}/v1"


def _answering(plan: Plan, recipe: ServeRecipe) -> dict[str, Any]:
    """What an endpoint offers, once it answers over HTTP as it does to clients; its models' list may need a key."""
    url, verify = url_of(recipe), trusting(str(plan.tls[0]) if plan.tls else None)
    health = url.removesuffix("/v1") + "/healthz"
    httpx.get(health, timeout=READY_TIMEOUT_S, trust_env=False, verify=verify).raise_for_status()
    nobody: Any = None
    return {"url": url, "models": catalog_of(plan, dict.fromkeys(plan.members, nobody)).names()}


def reason(application: str = NAME) -> str | None:
    """What a replica that could not start said last; Serve's own error only names its deployment."""
    known = ray_serve.status().applications.get(application)
    for deployment in known.deployments.values() if known else ():
        lines = [line for line in deployment.message.splitlines() if line and not line.startswith(" ")]
        if deployment.status == "DEPLOY_FAILED" and lines:
            return str(lines[-1])
    return None


def drain() -> None:
    """Refuse what is new; returns when what is under way has ended, or has had the recipe's drain_s."""
    door.close()
    _delete({NAME} & set(ray_serve.status().applications))


def down() -> None:
    """The same, then end Serve on this cluster."""
    drain()
    ray_serve.shutdown()
    limits.stop()
