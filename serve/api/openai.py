"""The OpenAI surface, and /healthz, /readyz, /metrics: plain FastAPI over a Catalog.

The gateway mounts it under Ray Serve, tests call it without.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse

from serve.api import tokens
from serve.api.access import Guard, Visit, Visiting
from serve.api.answering import Answering
from serve.api.answers import ChatShape, CompletionShape
from serve.api.document import describe
from serve.api.embeddings import EmbeddingBody, embeddings
from serve.api.prompts import Chat
from serve.api.refusals import BoundedBody, BoundedOpen, handle_errors
from serve.api.responses import ResponsesBody, ResponseShape
from serve.api.schema import ChatBody, CompletionBody
from serve.api.spent import Record
from serve.api.tokens import DetokenizeBody, TokenizeBody
from serve.catalog import Catalog
from ulm.recipes.serve import MAX_OPEN

T = TypeVar("T")
SHARED_S = 1.0


def shared(look: Callable[[], Awaitable[T]]) -> Callable[[], Awaitable[T]]:
    """A look that all who ask within a second share: many who ask cost no more than one."""
    latest: asyncio.Future[T] | None = None
    ends_s = 0.0

    async def seen() -> T:
        nonlocal latest, ends_s
        now_s = asyncio.get_running_loop().time()
        if latest is None or (latest.done() and now_s >= ends_s):
            latest, ends_s = asyncio.ensure_future(look()), now_s + SHARED_S
        return await asyncio.shield(latest)  # whoever leaves does not end it for others

    return seen


def build_app(
    catalog: Catalog,
    record: Record,
    metrics: Callable[[], Awaitable[str]],
    started: int | None = None,
    max_open: int = MAX_OPEN,
    guard: Guard = Guard(),  # noqa: B008  frozen
) -> FastAPI:
    """The endpoint as an ASGI application. `metrics` gives the text of /metrics."""
    app = FastAPI(title="µLM", description="A swarm of small language models behind OpenAI's API.")
    answering = Answering(catalog, record)
    created = started if started is not None else int(time.time())
    handle_errors(app, record)
    app.add_middleware(BoundedBody)
    guard.add_to(app, record)
    app.add_middleware(BoundedOpen, max_open=max_open, record=record)  # before all that takes time

    @app.get("/v1/models")
    async def models(visit: Visiting) -> dict[str, Any]:
        return {"object": "list", "data": [card(name, visit) for name in catalog.names(visit.models)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str, visit: Visiting) -> dict[str, Any]:
        return card(name, visit)

    def card(name: str, visit: Visit) -> dict[str, Any]:
        of = catalog.model(name, allowed=visit.models)
        # beside OpenAI's fields those of vLLM: what an alias stands for, and how much it reads
        more = {"root": of.name, "max_model_len": of.context_tokens}
        return {"id": name, "object": "model", "created": created, "owned_by": "ulm", **more}

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionBody, visit: Visiting) -> JSONResponse | StreamingResponse:
        return await answering.respond(body, body.prompts(), CompletionShape, visit)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: ChatBody, visit: Visiting) -> JSONResponse | StreamingResponse:
        return await answering.respond(body, [Chat(body.plain())], ChatShape, visit)

    @app.post("/v1/responses", response_model=None)
    async def responses(body: ResponsesBody, visit: Visiting) -> JSONResponse | StreamingResponse:
        return await answering.respond(body, [body.chat()], ResponseShape, visit)

    @app.post("/v1/embeddings")
    async def embed(body: EmbeddingBody, visit: Visiting) -> dict[str, Any]:
        return await embeddings(catalog, body, visit, record)

    @app.post("/tokenize")  # vLLM's place
    @app.post("/v1/tokenize")
    async def tokenize(body: TokenizeBody, visit: Visiting) -> dict[str, Any]:
        return await tokens.answered(tokens.tokenize, catalog, body, visit, record)

    @app.post("/detokenize")
    @app.post("/v1/detokenize")
    async def detokenize(body: DetokenizeBody, visit: Visiting) -> dict[str, Any]:
        return await tokens.answered(tokens.detokenize, catalog, body, visit, record)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    async def look() -> list[str]:
        engines = {id(m.engine): m.engine for m in catalog.members.values()}
        found = await asyncio.gather(*(engine.members() for engine in engines.values()), return_exceptions=True)
        loaded = {name for members in found if not isinstance(members, BaseException) for name in members}
        return sorted(set(catalog.members) - loaded)

    missing, page = shared(look), shared(metrics)  # anybody may ask, as often as they like

    @app.get("/readyz", response_model=None)
    async def readyz() -> JSONResponse:
        lacking = await missing()
        status = {"status": "ready"} if not lacking else {"status": "not ready", "missing": lacking}
        return JSONResponse(status, 503 if lacking else 200)

    @app.get("/metrics", response_model=None)
    async def metrics_page() -> PlainTextResponse:
        return PlainTextResponse(await page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    describe(app)

    return app
