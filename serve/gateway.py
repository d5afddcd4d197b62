"""The gateway: the OpenAI application in a Ray Serve replica, with its own HTTP server, its engines behind handles."""

from __future__ import annotations

import asyncio
from typing import Any

from ray import serve as ray_serve
from ray.serve.handle import DeploymentHandle

from serve import door
from serve.api.access import Guard
from serve.api.openai import build_app
from serve.api.request_log import RequestLog
from serve.contracts import Engine
from serve.limits import RemoteAccounts
from serve.member import DRAIN_LOOP_S, HEALTH_PERIOD_S, EngineHost, RemoteEngine
from serve.metrics import gather, recorder
from serve.plan import Plan, catalog_of, engine_of
from serve.server import Server
from ulm.errors import MemberDownError
from ulm.recipes.serve import ServeRecipe

ASK_AGAIN_S = 0.5


@ray_serve.deployment(
    ray_actor_options={"num_cpus": 0},
    health_check_period_s=HEALTH_PERIOD_S,
    graceful_shutdown_wait_loop_s=DRAIN_LOOP_S,
    max_surge_percent=100,  # of another recipe: there before the old ones go
)
@ray_serve.ingress()
class Gateway:
    """One catalog over all engines. The application is built in the replica, where the handles work.

    A group without a handle has its engine here: a hop less, about 5 ms of a request on two cores.
    Where there is a door, clients are answered at its port, else through Ray Serve's proxy.
    """

    def __init__(self, plan: Plan, recipe: ServeRecipe, has_door: bool, *handles: DeploymentHandle | None) -> None:
        self._plan, self._recipe, self._record = plan, recipe, recorder()
        self._has_door = has_door
        self._app: Any = None
        self._server: Server | None = None
        self._host: EngineHost | None = None
        self._awaited: dict[RemoteEngine, tuple[str, ...]] = {}  # engines that have not answered yet
        by_member: dict[str, Engine] = {}  # one object per engine: strategies compare it by identity
        for names, handle in zip(plan.groups, handles, strict=True):
            if handle is None:
                self._host = EngineHost(recipe.engine, {n: str(plan.members[n].checkpoint) for n in names}, "gateway")
                by_member |= dict.fromkeys(names, self._host.engine)
            else:  # strategies stop waiting first: they know whom else to ask
                replicas = (engine_of(plan.members[names[0]], recipe) or {}).get("max_replicas", recipe.replicas)
                remote = RemoteEngine(handle, 2 * plan.patience_s, replicas - 1, self._record)
                self._awaited[remote] = names
                by_member |= dict.fromkeys(names, remote)
        self._catalog = catalog_of(plan, by_member)

    async def check_health(self) -> None:
        """Loads the members of an engine of its own at the first call, and waits there until all others have theirs.

        Later a failing member is its engine's matter: a gateway that ended for it would take the others along.
        """
        if self._host is not None:
            await self._host.check()
        for engine, names in list(self._awaited.items()):
            while not set(names) <= await _loaded(engine):
                await asyncio.sleep(ASK_AGAIN_S)
            self._awaited.pop(engine, None)
        if self._server is not None:
            self._server.check()
        elif self._has_door:
            self._server = Server(self._app, await door.port(), self._plan.tls)
            await self._server.begun()

    async def serves(self) -> tuple[Plan, ServeRecipe]:
        """What it was made of."""
        return self._plan, self._recipe

    def __serve_build_asgi_app__(self) -> Any:
        """Called by Serve after the constructor."""
        guard = _guard(self._plan, self._recipe)
        self._app = build_app(self._catalog, self._record, gather, max_open=self._recipe.max_open, guard=guard)
        return self._app

    async def __del__(self) -> None:
        """Called by Serve when the replica ends, and waited for."""
        if self._server is not None:
            await self._server.drain(is_last=not await door.is_open(), drain_s=self._recipe.drain_s)


def _guard(plan: Plan, recipe: ServeRecipe) -> Guard:
    """Who may ask, by a plan whose accounts are there."""
    return Guard(
        accounts=RemoteAccounts(plan.accounts) if plan.accounts else None,
        is_local=recipe.keys is None,
        log=RequestLog(plan.request_log) if plan.request_log else None,
        cors=recipe.cors,
    )


async def _loaded(engine: RemoteEngine) -> set[str]:
    """The members that an engine has; none while it is not there."""
    try:
        return set(await engine.members())
    except MemberDownError:
        return set()
