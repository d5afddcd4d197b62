"""Members mixed in probability space, token by token: what route (top 1) and mixture (top k) share.

p(x_t | x_<t) = sum_j w_j(x_<t) p_j(x_t | x_<t), w from the clusters' router: c-BTM, arXiv 2303.14177, section 2.3.
Where one engine holds all members it does the mixing; otherwise this loop asks each engine for its probabilities.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import replace

import numpy as np
import torch

from serve.contracts import (
    Call,
    GenerateRequest,
    Ledger,
    Member,
    RouterWeights,
    SwarmContext,
    TokenChunk,
    TokenLogprob,
)
from ulm.models.generate import room
from ulm.models.sampling import choose
from ulm.models.text_stream import TextStream
from ulm.recipes.serve import Budget
from ulm.swarm.mixture import mix_logprobs
from ulm.swarm.router import Router, top_k


def missing(members: Mapping[str, Member], context: SwarmContext) -> str | None:
    """What an ensemble lacks here, or None."""
    if context.router is None or not set(context.router.ids) <= set(members):
        return "a router and its experts"
    if len({members[name].tokenizer.digest for name in context.router.ids}) > 1:
        return "one vocabulary for all experts"
    return None


async def ensemble(
    name: str,
    request: GenerateRequest,
    members: Mapping[str, Member],
    context: SwarmContext,
    budget: Budget,
    num_members: int,
    every_tokens: int,
) -> AsyncIterator[TokenChunk | Ledger]:
    """Chunks of the answer, the Ledger last."""
    assert context.router is not None and context.router_path is not None
    chosen = [members[name] for name in context.router.ids]  # in the order of the router's weights
    ledger = Ledger(name, budget=budget)
    num_members = min(num_members, len(chosen))
    for limit, most in (("max_calls", budget.max_calls), ("max_tokens", budget.max_tokens)):
        if most is not None and most < num_members:
            ledger.degraded.append(f"top_k cut to {most} by budget.{limit}")
            num_members = most
    request = within(request, budget, num_members, ledger)
    weights = RouterWeights(
        context.router_path, tuple(m.id for m in chosen), num_members, every_tokens, budget.max_calls
    )
    request = replace(request, weights=weights)
    if len({id(m.engine) for m in chosen}) == 1:
        chunks = chosen[0].engine.generate(request)
    else:
        chunks = step_loop(request, weights, {m.id: m for m in chosen}, context.router)
    async with aclosing(accounted(chunks, ledger)) as reported:  # type: ignore[type-var]
        async for chunk in reported:
            yield chunk
    yield ledger


def within(request: GenerateRequest, budget: Budget, num_members: int, ledger: Ledger) -> GenerateRequest:
    """The request under its budget: each of `num_members` generates every token, and the clock is the engine's."""
    if budget.max_tokens is not None and budget.max_tokens // num_members < request.max_tokens:
        request = replace(request, max_tokens=budget.max_tokens // num_members)
        ledger.degraded.append(f"answer cut to {request.max_tokens} tokens by budget.max_tokens")
    if budget.max_ms is not None:
        request = replace(request, deadline_s=budget.max_ms / 1e3)
    return request


async def accounted(chunks: AsyncIterator[TokenChunk], ledger: Ledger) -> AsyncIterator[TokenChunk]:
    """The chunks, with what the last one reports entered. A client that leaves ends the engine's work at once."""
    async with aclosing(chunks):  # type: ignore[type-var]
        async for chunk in chunks:
            ledger.calls.extend(chunk.calls)
            if chunk.degraded:
                ledger.degraded.append(chunk.degraded)
            yield chunk


async def step_loop(
    request: GenerateRequest, asked: RouterWeights, members: Mapping[str, Member], router: Router
) -> AsyncIterator[TokenChunk]:
    """The same answer as one engine's, over members in several engines: one round of next_logprobs a token."""
    started_s = time.monotonic()
    tokenizer = members[asked.members[0]].tokenizer
    tokens, stream = list(request.tokens), TextStream(tokenizer, request.stop)
    max_tokens = min(request.max_tokens, room(len(tokens), min(m.context_tokens for m in members.values())))
    weights: dict[str, float] = {}
    calls: list[Call] = []
    finish_reason, degraded = "length", None
    for index in range(max_tokens):
        if request.deadline_s is not None and time.monotonic() - started_s > request.deadline_s:
            degraded = "budget.max_ms reached"
            break
        if index % asked.every_tokens == 0:
            wanted = _weights(router, tokenizer.decode(tokens), asked)
            joining = [m for m in wanted if m not in weights]
            if asked.max_calls is not None and len(calls) + len(joining) > asked.max_calls:
                degraded = "budget.max_calls reached: members kept"
            else:
                why = "re-routed" if weights else "routed"
                calls += [Call(m, len(tokens), 0, 0.0, 0.0, why) for m in joining]
                weights = wanted
        clock_s = time.monotonic()
        rows = await asyncio.gather(*(members[m].engine.next_logprobs(m, tokens) for m in weights))
        logprobs_V = mix_logprobs(torch.from_numpy(np.stack(rows)), torch.tensor(list(weights.values())))
        token = choose(logprobs_V, request.sampling, index, request.tokens, tokens[len(request.tokens) :])
        ended = token == tokenizer.eot_id
        ms = 1e3 * (time.monotonic() - clock_s)
        latest = {call.member: at for at, call in enumerate(calls)}
        for member, weight in weights.items():
            calls[latest[member]] = _longer(calls[latest[member]], ms, None if ended else weight)
        if ended:
            finish_reason = "stop"
            break
        tokens.append(token)
        text = stream.push(token)
        yield TokenChunk(text, (token,), TokenLogprob.of(logprobs_V, token, request.num_top_logprobs))
        if stream.stopped:
            finish_reason = "stop"
            break
    yield TokenChunk(stream.finish(), (), finish_reason=finish_reason, calls=tuple(calls), degraded=degraded)


def _weights(router: Router, text: str, asked: RouterWeights) -> dict[str, float]:
    weights_N = top_k(router.weights(text), asked.top_k)
    return {m: float(w) for m, w in zip(asked.members, weights_N, strict=True) if w > 0}


def _longer(call: Call, ms: float, weight: float | None) -> Call:
    """A call with one more step; `weight` None when the step ended the answer."""
    if weight is None:
        return replace(call, ms=round(call.ms + ms, 3))
    mean = (call.weight * call.tokens_out + weight) / (call.tokens_out + 1)
    return replace(call, ms=round(call.ms + ms, 3), tokens_out=call.tokens_out + 1, weight=mean)
