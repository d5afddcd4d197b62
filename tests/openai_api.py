"""The endpoint in a test: an application over engines in this process, without Ray, and what asks it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from fastapi.testclient import TestClient

import ulm
from serve.api.openai import build_app
from serve.catalog import Catalog
from serve.contracts import Engine, Member, SwarmContext
from serve.engines.echo import Config, EchoEngine
from ulm.recipes.serve import Budget
from ulm.swarm.manifest import Swarm

Records = list[tuple[str, float, Mapping[str, str]]]
STARTED = 1_700_000_000


def catalog_of(swarm: Swarm, engines: Mapping[str, Engine], **more: Any) -> Catalog:
    """What a swarm offers over these engines."""
    members = {}
    for name, entry in swarm.members.items():
        model, tokenizer = ulm.load(swarm.checkpoint(name))
        context = model.spec.context_tokens
        members[name] = Member(name, engines[name], tokenizer, context, entry.cluster, entry.domain)
    context = SwarmContext(swarm.router(), fallback=("seed",))
    return Catalog(members, context, swarm.manifest.strategy, Budget(), **more)


def echoes(swarm: Swarm, kind: type[EchoEngine] = EchoEngine, members: tuple[str, ...] = ()) -> dict[str, Engine]:
    """An echo engine for these members, and another for the others."""
    found: dict[str, Engine] = {}
    for cls, names in ((kind, members), (EchoEngine, tuple(m for m in swarm.members if m not in members))):
        made = cls(Config(kind="echo"))
        for name in names:
            asyncio.run(made.load(name, str(swarm.checkpoint(name))))
        found |= dict.fromkeys(names, made)
    return found


def client_of(catalog: Catalog, records: Records | None = None, **more: Any) -> TestClient:
    """A client of the application; `records` takes in its metrics."""

    async def metrics() -> str:
        return "ray_ulm_requests_total 1\n"

    seen: Records = [] if records is None else records
    app = build_app(catalog, lambda *record: seen.append(record), metrics, started=STARTED, **more)
    return TestClient(app, raise_server_exceptions=False)


def complete(client: TestClient, **body: Any) -> Any:
    """A greedy completion of a few tokens by e00, unless said otherwise."""
    asked = {"model": "e00", "prompt": "The", "max_tokens": 12, "temperature": 0, **body}
    response = client.post("/v1/completions", json=asked)
    assert response.status_code == 200, response.text
    return response.json()


def events(client: TestClient, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """What a stream says, without its end."""
    response = client.post(path, json={**body, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
