"""The gateway: the OpenAI application in a Ray Serve replica, its engines behind handles."""

from __future__ import annotations

from typing import Any

from ray import serve as ray_serve
from ray.serve.handle import DeploymentHandle

from serve.api.openai import build_app
from serve.contracts import Engine
from serve.member import EngineHost, RemoteEngine
from serve.metrics import gather, recorder
from serve.plan import Plan, catalog_of


@ray_serve.deployment(max_ongoing_requests=1_000, ray_actor_options={"num_cpus": 0})
@ray_serve.ingress()
class Gateway:
    """One catalog over all engines. The application is built in the replica, where the handles work.

    A group without a handle has its engine here: a hop less, about 5 ms of a request on two cores.
    """

    def __init__(self, plan: Plan, engine: dict[str, Any], *handles: DeploymentHandle | None) -> None:
        self._host: EngineHost | None = None
        by_member: dict[str, Engine] = {}  # one object per engine: strategies compare it by identity
        for names, handle in zip(plan.groups, handles, strict=True):
            if handle is None:
                self._host = EngineHost(engine, {n: str(plan.members[n].checkpoint) for n in names}, "gateway")
                by_member |= dict.fromkeys(names, self._host.engine)
            else:  # strategies stop waiting first: they know whom else to ask
                by_member |= dict.fromkeys(names, RemoteEngine(handle, 2 * plan.patience_s))
        self._catalog = catalog_of(plan, by_member)

    async def check_health(self) -> None:
        """Loads the members of an engine of its own at the first call."""
        if self._host is not None:
            await self._host.ready()

    def __serve_build_asgi_app__(self) -> Any:
        """Called by Serve after the constructor."""
        return build_app(self._catalog, recorder(), gather)
