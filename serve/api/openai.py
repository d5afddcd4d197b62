"""The OpenAI surface: /v1/models, /v1/completions, /v1/chat/completions, and /healthz, /readyz, /metrics.

Plain FastAPI over a Catalog; the gateway mounts it under Ray Serve, tests call it without.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse

from serve.api.answers import ChatShape, Choices, CompletionShape, Shape, ledger_json
from serve.api.refusals import BoundedBody, error_body, handle_errors
from serve.api.schema import ChatBody, CompletionBody, GenerationBody
from serve.api.spent import Record, record_ledger
from serve.catalog import Catalog, Model
from serve.contracts import GenerateRequest, Ledger, TokenChunk
from ulm.errors import RequestError
from ulm.models.generate import prompt_tokens, room
from ulm.models.sampling import MAX_SEED, Sampling
from ulm.recipes.serve import Budget
from ulm.tokenizers.chat import CHAT_STOP

LONG_PROMPTS = 4_000  # characters or tokens; fewer take less time than another thread


class Answering:
    """Turns bodies into answers, and reports what they took."""

    def __init__(self, catalog: Catalog, record: Record) -> None:
        self.catalog, self._record = catalog, record

    async def respond(
        self, body: CompletionBody | ChatBody, prompts: list[str | list[int]], shape_of: type[Shape]
    ) -> JSONResponse | StreamingResponse:
        """The response, streamed or whole. Errors before the first token are raised, with their status."""
        started_s = time.monotonic()
        model = self.catalog.model(body.model, body.ulm.strategy_options())
        tags = {"model": model.name, "strategy": model.kind}
        try:
            if sum(map(len, prompts)) > LONG_PROMPTS:  # others are not kept waiting while these are tokenized
                requests = await asyncio.to_thread(self._requests, body, model, prompts)
            else:
                requests = self._requests(body, model, prompts)
            shape = shape_of(model.name, model.tokenizer, body.num_top_logprobs is not None)
            answer = self._run(body, model, requests, started_s)
            first = await anext(answer)  # so that a refusal is a status, not a broken stream
        except BaseException as error:
            self._count(tags, "refused" if isinstance(error, RequestError) else _outcome(error), started_s)
            raise
        if body.stream:
            events = self._events(body, shape, requests, first, answer, tags, started_s)
            headers = {"X-Accel-Buffering": "no", "Cache-Control": "no-cache"}
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        choices, ledger = Choices([len(request.tokens) for request in requests]), Ledger(model.kind)
        try:
            async for prompt, item in _chain(first, answer):
                if isinstance(item, Ledger):
                    ledger = _joined(ledger, item)
                else:
                    choices.find(prompt, item.index)[0].add(item)
        except BaseException as error:
            self._count(tags, _outcome(error), started_s)
            raise
        self._finish(tags, choices, ledger, started_s)
        return JSONResponse(shape.whole(choices, ledger))

    def _requests(
        self, body: CompletionBody | ChatBody, model: Model, prompts: list[str | list[int]]
    ) -> list[GenerateRequest]:
        return [self._request(body, model, prompt) for prompt in prompts]

    def _request(self, body: CompletionBody | ChatBody, model: Model, prompt: str | list[int]) -> GenerateRequest:
        longest = model.context_tokens * model.tokenizer.max_token_bytes
        if isinstance(prompt, str) and len(prompt) > longest:  # surely too long: not worth tokenizing
            room(len(prompt) // model.tokenizer.max_token_bytes, model.context_tokens)
        if isinstance(body, ChatBody):  # from the messages: in the rendered prompt nothing tells their text apart
            tokens = [model.tokenizer.eot_id, *model.tokenizer.encode_chat(body.plain())]
        else:
            tokens = prompt_tokens(model.tokenizer, prompt)
        if not tokens or any(token >= model.tokenizer.vocab_size for token in tokens):
            raise RequestError("prompt: token ids must be below the vocabulary's size, at least one", param="prompt")
        left = room(len(tokens), model.context_tokens)
        max_tokens = body.max_tokens or getattr(body, "max_completion_tokens", None) or left
        seed = body.seed if body.seed is not None else secrets.randbelow(MAX_SEED)
        stop = body.stop_strings or ((CHAT_STOP,) if isinstance(body, ChatBody) else ())
        return GenerateRequest(
            tokens=tuple(tokens),
            weights={},
            max_tokens=min(max_tokens, left),
            sampling=Sampling(temperature=body.temperature, top_k=body.top_k, top_p=body.top_p, seed=seed),
            stop=stop,
            num_top_logprobs=body.num_top_logprobs,
            stream=body.stream,
        )

    async def _run(
        self, body: GenerationBody, model: Model, requests: list[GenerateRequest], started_s: float
    ) -> AsyncIterator[tuple[int, TokenChunk | Ledger]]:
        """Chunks of all prompts, one prompt after the other, with the prompt's index; each has what others left."""
        budget, began_s = self.catalog.budget_of(body.ulm.budget), time.monotonic()
        spent = Ledger(model.kind, budget=budget)
        for index, request in enumerate(requests):
            left = _left(budget, spent, 1e3 * (time.monotonic() - began_s)) if index else budget
            if isinstance(left, str):
                yield index, TokenChunk("", (), finish_reason="length")
                yield index, Ledger(model.kind, budget=budget, degraded=[f"ended after 0 tokens by budget.{left}"])
                continue
            async with aclosing(self.catalog.answer(model, request, left)) as answer:  # type: ignore[type-var]
                async for item in answer:
                    if isinstance(item, Ledger):
                        item = replace(item, budget=budget)
                        spent = _joined(spent, item)
                    if started_s and isinstance(item, TokenChunk):
                        tags = {"model": model.name, "strategy": model.kind}
                        self._record("ulm_ttft_seconds", time.monotonic() - started_s, tags)
                        started_s = 0.0
                    yield index, item

    async def _events(
        self,
        body: GenerationBody,
        shape: Shape,
        requests: list[GenerateRequest],
        first: tuple[int, TokenChunk | Ledger],
        answer: AsyncIterator[tuple[int, TokenChunk | Ledger]],
        tags: dict[str, str],
        started_s: float,
    ) -> AsyncIterator[str]:
        choices = Choices([len(request.tokens) for request in requests])
        ledger, held, outcome = Ledger(tags["strategy"]), None, "cancelled"
        chained = _chain(first, answer)
        try:
            async for prompt, item in chained:
                if isinstance(item, Ledger):
                    ledger = _joined(ledger, item)
                    if held is not None and prompt == len(requests) - 1 and not body.include_usage:
                        held = {**held, "ulm": ledger_json(ledger)}
                    if held is not None:
                        yield _event(held)
                    held = None
                    continue
                choice, is_new = choices.find(prompt, item.index)
                if is_new and (opening := shape.opening(choice.index)) is not None:
                    yield _event(opening)
                piece = shape.piece(item, choice)
                choice.add(item)
                if item.finish_reason is not None:
                    if held is not None:
                        yield _event(held)
                    held = piece  # the ledger, which follows the last one, may belong on it
                elif item.text or item.logprobs:
                    yield _event(piece)
            if body.include_usage:
                yield _event({**shape.tail(choices), "ulm": ledger_json(ledger)})
            outcome = "ok"
            yield "data: [DONE]\n\n"
        except Exception as error:  # noqa: BLE001  the stream has begun: the error can only be an event
            outcome = "failed"
            yield _event(error_body(str(error) or type(error).__name__, "server_error"))
        finally:
            await chained.aclose()  # type: ignore[attr-defined]  # a client that left frees its rows now
            self._finish(tags, choices, ledger, started_s, outcome)

    def _count(self, tags: dict[str, str], outcome: str, started_s: float) -> None:
        self._record("ulm_requests_total", 1, {**tags, "outcome": outcome})
        self._record("ulm_request_seconds", time.monotonic() - started_s, tags)

    def _finish(
        self, tags: dict[str, str], choices: Choices, ledger: Ledger, started_s: float, outcome: str = "ok"
    ) -> None:
        self._count(tags, outcome, started_s)
        model = {"model": tags["model"]}
        self._record("ulm_tokens_total", choices.num_prompt_tokens, {**model, "kind": "prompt"})
        generated = choices.num_tokens
        self._record("ulm_tokens_total", generated, {**model, "kind": "generated"})
        if generated:
            rate = generated / max(1e-9, time.monotonic() - started_s)
            self._record("ulm_generated_tokens_per_second", rate, model)
        record_ledger(self._record, ledger)


async def _chain(
    first: tuple[int, TokenChunk | Ledger], rest: AsyncIterator[tuple[int, TokenChunk | Ledger]]
) -> AsyncIterator[tuple[int, TokenChunk | Ledger]]:
    async with aclosing(rest):  # type: ignore[type-var]
        yield first
        async for item in rest:
            yield item


def _outcome(error: BaseException) -> str:
    return "failed" if isinstance(error, Exception) else "cancelled"  # the client has left


def _joined(ledger: Ledger, more: Ledger) -> Ledger:
    return replace(more, calls=ledger.calls + more.calls, degraded=ledger.degraded + more.degraded)


def _left(budget: Budget, spent: Ledger, ms: float) -> Budget | str:
    """What a request may still spend on its next prompt, or the name of the limit that it has reached."""
    tokens = sum(call.tokens_out for call in spent.calls)
    so_far = {"max_calls": len(spent.calls), "max_tokens": tokens, "max_ms": ms}
    left = {name: most - so_far[name] for name, most in budget.model_dump(exclude_none=True).items()}
    reached = next((name for name, rest in left.items() if rest < 1), None)
    return reached or Budget(**{name: int(rest) for name, rest in left.items()})


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def build_app(
    catalog: Catalog, record: Record, metrics: Callable[[], Awaitable[str]], started: int | None = None
) -> FastAPI:
    """The endpoint as an ASGI application. `metrics` gives the text of /metrics."""
    app = FastAPI(title="µLM", description="A swarm of small language models behind OpenAI's API.")
    answering = Answering(catalog, record)
    created = started if started is not None else int(time.time())
    handle_errors(app)
    app.add_middleware(BoundedBody)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card(name) for name in catalog.names()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        catalog.model(name)
        return card(name)

    def card(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": created, "owned_by": "ulm"}

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionBody) -> JSONResponse | StreamingResponse:
        return await answering.respond(body, body.prompts(), CompletionShape)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: ChatBody) -> JSONResponse | StreamingResponse:
        tokenizer = catalog.model(body.model).tokenizer
        prompt = await asyncio.to_thread(tokenizer.render_chat, body.plain())
        return await answering.respond(body, [prompt], ChatShape)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", response_model=None)
    async def readyz() -> JSONResponse:
        engines = {id(m.engine): m.engine for m in catalog.members.values()}
        found = await asyncio.gather(*(engine.members() for engine in engines.values()), return_exceptions=True)
        loaded = {name for members in found if not isinstance(members, BaseException) for name in members}
        lacking = sorted(set(catalog.members) - loaded)
        status = {"status": "ready"} if not lacking else {"status": "not ready", "missing": lacking}
        return JSONResponse(status, 503 if lacking else 200)

    @app.get("/metrics", response_model=None)
    async def metrics_page() -> PlainTextResponse:
        return PlainTextResponse(await metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app
