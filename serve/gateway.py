"""The gateway: the OpenAI application in a Ray Serve replica, its engines behind handles."""

from __future__ import annotations

from typing import Any

from ray import serve as ray_serve
from ray.serve.handle import DeploymentHandle

from serve.api.openai import build_app
from serve.catalog import Catalog
from serve.contracts import Engine, Member, SwarmContext
from serve.member import EngineHost, RemoteEngine
from serve.metrics import gather, recorder
from serve.plan import Plan
from ulm.checkpoints import store
from ulm.swarm.router import Router
from ulm.tokenizers.tokenizer import Tokenizer


@ray_serve.deployment(max_ongoing_requests=1_000, ray_actor_options={"num_cpus": 0})
@ray_serve.ingress()
class Gateway:
    """One catalog over all engines. The application is built in the replica, where the handles work.

    Without `handles` it runs the one engine itself: a hop less, about 5 ms of a request on two cores.
    """

    def __init__(self, plan: Plan, engine: dict[str, Any], *handles: DeploymentHandle) -> None:
        self._host: EngineHost | None = None
        # Strategies stop waiting first: they know whom else to ask.
        engines: list[Engine] = [RemoteEngine(handle, 2 * plan.patience_s) for handle in handles]
        if not handles:
            checkpoints = {name: str(member.checkpoint) for name, member in plan.members.items()}
            self._host = EngineHost(engine, checkpoints, "gateway")
            engines = [self._host.engine]
        # one object per engine: strategies compare it by identity
        by_group = dict(zip(plan.groups, engines, strict=True))
        members = {}
        for names in plan.groups:
            for name in names:
                planned = plan.members[name]
                spec = store.read_spec(planned.checkpoint)
                tokenizer = Tokenizer.read(planned.checkpoint)
                members[name] = Member(
                    name, by_group[names], tokenizer, spec.context_tokens, planned.cluster, planned.domain
                )
        router = Router.load(plan.router) if plan.router else None
        context = SwarmContext(router, plan.fallback, patience_s=plan.patience_s)
        self._catalog = Catalog(members, context, plan.strategy, plan.budget, plan.limits)

    async def check_health(self) -> None:
        """Loads the members of an engine of its own at the first call."""
        if self._host is not None:
            await self._host.ready()

    def __serve_build_asgi_app__(self) -> Any:
        """Called by Serve after the constructor."""
        return build_app(self._catalog, recorder(), gather)
