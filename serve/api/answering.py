"""From a body to an answer, whole or streamed, and what it took."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import Any

from fastapi.responses import JSONResponse, StreamingResponse

from serve.api.access import Visit
from serve.api.answers import Choices, Shape
from serve.api.prompts import Chat, Prompt, read_prompt
from serve.api.schema import GenerationBody
from serve.api.spent import Record, count, outcome_of, record_ledger
from serve.catalog import Catalog, Model
from serve.contracts import GenerateRequest, Ledger, TokenChunk
from ulm.errors import RequestError
from ulm.models.generate import room
from ulm.models.sampling import MAX_SEED
from ulm.recipes.serve import Budget
from ulm.tokenizers.chat import CHAT_STOP
from ulm.tokenizers.tokenizer import Tokenizer

LONG_PROMPTS = 4_000  # characters or tokens; fewer take less time than another thread
ANYBODY = ""  # a member's place in a request that no strategy has seen yet


class Answering:
    """Turns bodies into answers, and reports what they took."""

    def __init__(self, catalog: Catalog, record: Record) -> None:
        self.catalog, self._record = catalog, record

    async def respond(
        self, body: GenerationBody, prompts: Sequence[Prompt], shape_of: Callable[[Any, Tokenizer], Shape], visit: Visit
    ) -> JSONResponse | StreamingResponse:
        """The response, streamed or whole. Errors before the first token are raised, with their status."""
        started_s = time.monotonic()
        model = self.catalog.model(body.model, body.ulm.strategy_options(), visit.models)
        visit.model = model.name
        body = body.laid_over(model.defaults)
        tags = {"model": model.name, "strategy": model.kind}
        try:
            if sum(map(len, prompts)) > LONG_PROMPTS:  # others are not kept waiting while these are tokenized
                requests = await asyncio.to_thread(self._requests, body, model, prompts)
            else:
                requests = self._requests(body, model, prompts)
            await visit.reserve(_most_tokens(model, requests, self.catalog.budget_of(body.ulm.budget)))
            shape = shape_of(body, model.tokenizer)
            answer = self._run(body, model, requests, started_s)
            with visit.owing(sum(len(request.tokens) for request in requests)):
                first = await anext(answer)  # so that a refusal is a status, not a broken stream
        except BaseException as error:
            count(self._record, tags, outcome_of(error), started_s)
            raise
        if body.stream:
            events = self._events(shape, requests, first, answer, tags, started_s, visit)
            headers = {"X-Accel-Buffering": "no", "Cache-Control": "no-cache"}
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        choices, ledger = Choices([request.tokens for request in requests]), Ledger(model.kind)
        try:
            async for prompt, item in _chain(first, answer):
                if isinstance(item, Ledger):
                    ledger = _joined(ledger, item)
                else:
                    choices.find(prompt, item.index)[0].add(item)
        except BaseException as error:
            outcome = "failed" if isinstance(error, Exception) else "cancelled"
            count(self._record, tags, outcome, started_s)
            visit.tokens = 0 if isinstance(error, Exception) else choices.total_tokens  # who leaves has had them
            raise
        choices.num_discarded = ledger.num_discarded
        await visit.used(choices.total_tokens)
        self._finish(tags, choices, ledger, started_s)
        return JSONResponse(shape.whole(choices, ledger))

    def _requests(self, body: GenerationBody, model: Model, prompts: Sequence[Prompt]) -> list[GenerateRequest]:
        with _schema_named(body.format_place):
            return [self._request(body, model, prompt) for prompt in prompts]

    def _request(self, body: GenerationBody, model: Model, prompt: Prompt) -> GenerateRequest:
        tokens = read_prompt(prompt, model.tokenizer, model.context_tokens)
        is_chat = isinstance(prompt, Chat)
        left = room(len(tokens), model.context_tokens) if body.most_tokens != 0 else 0
        request = GenerateRequest(
            tokens=tuple(tokens),
            weights={ANYBODY: 1.0},  # the strategy's choice takes their place
            max_tokens=left if body.most_tokens is None else min(body.most_tokens, left),
            sampling=body.sampling(secrets.randbelow(MAX_SEED)),
            stop=body.stop_strings or ((CHAT_STOP,) if is_chat else ()),
            num_top_logprobs=body.num_top_logprobs,
            stream=body.stream,
            **body.more(),
        )
        request.sampling.check(model.tokenizer.vocab_size)
        request.check()
        return request

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
            with _schema_named(body.format_place):
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
        shape: Shape,
        requests: list[GenerateRequest],
        first: tuple[int, TokenChunk | Ledger],
        answer: AsyncIterator[tuple[int, TokenChunk | Ledger]],
        tags: dict[str, str],
        started_s: float,
        visit: Visit,
    ) -> AsyncIterator[str]:
        choices = Choices([request.tokens for request in requests])
        ledger, outcome = Ledger(tags["strategy"]), "cancelled"
        chained = _chain(first, answer)
        try:
            for said in shape.begin():
                yield said
            async for prompt, item in chained:
                if isinstance(item, Ledger):
                    ledger = _joined(ledger, item)
                    continue
                choice, is_new = choices.find(prompt, item.index)
                for said in shape.add(item, choice, is_new):
                    yield said
                choice.add(item)
            await visit.used(choices.total_tokens)
            outcome = "ok"  # before the last event: who has that may leave
            for said in shape.end(choices, ledger):
                yield said
        except Exception as error:  # noqa: BLE001  the stream has begun: the error can only be an event
            outcome = "failed"
            yield shape.failed(str(error) or type(error).__name__)
        finally:
            visit.tokens = choices.total_tokens
            await chained.aclose()  # type: ignore[attr-defined]  # a client that left frees its rows now
            self._finish(tags, choices, ledger, started_s, outcome)

    def _finish(
        self, tags: dict[str, str], choices: Choices, ledger: Ledger, started_s: float, outcome: str = "ok"
    ) -> None:
        count(self._record, tags, outcome, started_s)
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


def _most_tokens(model: Model, requests: Sequence[GenerateRequest], budget: Budget) -> int:
    """What the usage of these can be at most."""
    answers = model.num_answers * sum(request.num_choices * request.max_tokens for request in requests)
    bound = answers if budget.max_tokens is None else min(answers, budget.max_tokens)
    return sum(len(request.tokens) for request in requests) + bound


@contextmanager
def _schema_named(place: str) -> Iterator[None]:
    """What is wrong with a schema, by the name that the body has for it."""
    try:
        yield
    except RequestError as error:
        if error.param != "json_schema":
            raise
        raise RequestError(place + str(error).removeprefix("json_schema"), param=place, code=error.code) from None


def _joined(ledger: Ledger, more: Ledger) -> Ledger:
    both = {name: getattr(ledger, name) + getattr(more, name) for name in ("calls", "degraded", "num_discarded")}
    return replace(more, **both)


def _left(budget: Budget, spent: Ledger, ms: float) -> Budget | str:
    """What a request may still spend on its next prompt, or the name of the limit that it has reached."""
    tokens = sum(call.tokens_out for call in spent.calls)
    so_far = {"max_calls": len(spent.calls), "max_tokens": tokens, "max_ms": ms}
    left = {name: most - so_far[name] for name, most in budget.model_dump(exclude_none=True).items()}
    reached = next((name for name, rest in left.items() if rest < 1), None)
    return reached or Budget(**{name: int(rest) for name, rest in left.items()})
