"""The gateway: the OpenAI application in a Ray Serve replica, its engines behind handles."""

from __future__ import annotations

from typing import Any

from ray import serve as ray_serve
from ray.serve.handle import DeploymentHandle

from serve.api.openai import build_app
from serve.catalog import Catalog
from serve.contracts import Member, SwarmContext
from serve.member import RemoteEngine
from serve.metrics import gather, recorder
from serve.plan import Plan
from ulm.checkpoints import store
from ulm.swarm.router import Router
from ulm.tokenizers.tokenizer import Tokenizer


@ray_serve.deployment(max_ongoing_requests=1_000, ray_actor_options={"num_cpus": 0})
@ray_serve.ingress()
class Gateway:
    """One catalog over all engines. The application is built in the replica, where the handles work."""

    def __init__(self, plan: Plan, *engines: DeploymentHandle) -> None:
        remote = {name: RemoteEngine(h) for names, h in zip(plan.groups, engines, strict=True) for name in names}
        by_group = {names: remote[names[0]] for names in plan.groups}
        members = {}
        for names in plan.groups:
            for name in names:
                planned = plan.members[name]
                spec = store.read_spec(planned.checkpoint)
                tokenizer = Tokenizer.read(planned.checkpoint)
                engine = by_group[names]  # one object per engine: strategies compare it by identity
                members[name] = Member(name, engine, tokenizer, spec.context_tokens, planned.cluster, planned.domain)
        router = Router.load(plan.router) if plan.router else None
        context = SwarmContext(router, str(plan.router) if plan.router else None)
        self._catalog = Catalog(members, context, plan.strategy, plan.budget)

    def __serve_build_asgi_app__(self) -> Any:
        """Called by Serve after the constructor."""
        return build_app(self._catalog, recorder(), gather)
