"""A mixture over members in several engines: one round of next_logprobs a token, mixed here.

p(x_t | x_<t) = sum_j w_j p_j(x_t | x_<t): c-BTM, arXiv 2303.14177, section 2.3. One engine with all members does the
same inside, faster; the answers are equal.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Mapping
from typing import TypeVar

import numpy as np
import torch

from serve.constrained import Grammars
from serve.contracts import GenerateRequest, Member, TokenChunk, TokenLogprob
from serve.strategies._failures import Failures, SilentError, of_member
from ulm.errors import UlmError
from ulm.models.sampling import choose
from ulm.models.text_stream import TextStream
from ulm.swarm.mixture import mix_logprobs

T = TypeVar("T")


class MembersFailed(Exception):  # noqa: N818  it is caught a floor above, and never shown
    """Some members could not do their part."""

    def __init__(self, why: Failures) -> None:
        self.why = dict(why)
        super().__init__("; ".join(f"{member}: {error}" for member, error in self.why.items()))


async def step_loop(
    request: GenerateRequest, members: Mapping[str, Member], patience_s: float, grammars: Grammars
) -> AsyncIterator[TokenChunk]:
    """Chunks of one token each, as an engine that holds all members would give them. Raises MembersFailed."""
    tokenizer = members[next(iter(request.weights))].tokenizer
    weight_N = torch.tensor(list(request.weights.values()), dtype=torch.float64)
    weight_N /= weight_N.sum()
    generated, stream = list(request.generated), TextStream(tokenizer, request.stop)
    for token in generated:
        stream.push(token)
    prompt, constraint = request.tokens, None
    if request.json_schema is not None:
        constraint = await grammars.begin(tokenizer, request.json_schema, request.generated)
    for _ in range(request.max_tokens):
        text = (*prompt, *generated)
        asked = {m: members[m].engine.next_logprobs(m, text) for m in request.weights}
        found, failed = await ask_all(asked, patience_s)
        for member, row in found.items():
            vocab_size = members[member].tokenizer.vocab_size
            if row.shape != (vocab_size,):
                failed[member] = UlmError(f"gave scores of shape {row.shape} for a vocabulary of {vocab_size}")
            elif np.isnan(row).any():
                failed[member] = UlmError("gave scores that are no numbers")
        if failed:
            raise MembersFailed(failed)
        rows = [found[member] for member in request.weights]
        logprobs_V = mix_logprobs(torch.from_numpy(np.stack(rows)), weight_N)
        scores_V = logprobs_V if constraint is None else constraint.masked(logprobs_V)
        token = choose(scores_V, request.sampling, len(generated), prompt, generated)
        if token == tokenizer.eot_id:
            yield TokenChunk("", (), finish_reason="stop")
            return
        generated.append(token)
        stream.push(token)
        if constraint is not None:
            constraint.append(token)
        has_ended = stream.stopped or (constraint is not None and constraint.is_whole)
        entry = TokenLogprob.of(logprobs_V, token, request.num_top_logprobs)
        yield TokenChunk("", (token,), entry, finish_reason="stop" if has_ended else None)
        if has_ended:
            return
    yield TokenChunk("", (), finish_reason="length")


async def ask_all(asked: Mapping[str, Awaitable[T]], patience_s: float) -> tuple[dict[str, T], dict[str, Exception]]:
    """What members answer, asked side by side, and why the others did not. Errors of the request are raised."""
    tasks = {member: asyncio.ensure_future(question) for member, question in asked.items()}
    try:
        await asyncio.wait(tasks.values(), timeout=patience_s)
        done = {member: task for member, task in tasks.items() if task.done()}
    finally:  # also when the client has left: every call it made ends with it
        for task in tasks.values():
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
    failed: dict[str, Exception] = {member: SilentError(patience_s) for member in tasks if member not in done}
    failed |= {m: of_member(error) for m, task in done.items() if (error := task.exception()) is not None}
    return {m: task.result() for m, task in done.items() if m not in failed}, failed
