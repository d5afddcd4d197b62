"""The local engine is held to the plain generator, and to itself in other company."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import ulm
from serve.contracts import GenerateRequest, TokenChunk
from tests.trained import num_equal_tokens
from ulm.errors import ContextLengthError, ModelNotFoundError
from ulm.models.generate import Generated, prompt_tokens
from ulm.models.sampling import Sampling, choose
from ulm.swarm.manifest import Swarm
from ulm.swarm.mixture import mix_logprobs

PROMPTS = ["def __init__(self", "The following", "Return the", "", "import ", "A class", "x = [", "Parameters"]
FP32_BATCHING = 2e-5  # float32 sums in another order


def load(swarm: Swarm, member: str) -> tuple[Any, Any]:
    return ulm.load(swarm.checkpoint(member))


def request(tokenizer: Any, prompt: str, weights: Any, **fields: Any) -> GenerateRequest:
    return GenerateRequest(tuple(prompt_tokens(tokenizer, prompt)), weights, **{"max_tokens": 24, **fields})


async def collect(engine: Any, asked: GenerateRequest) -> tuple[str, list[int], list[float], TokenChunk]:
    chunks = [chunk async for chunk in engine.generate(asked)]
    tokens = [token for chunk in chunks for token in chunk.tokens]
    logprobs = [entry.logprob for chunk in chunks for entry in chunk.logprobs]
    return "".join(chunk.text for chunk in chunks), tokens, logprobs, chunks[-1]


def test_many_answers_at_once_equal_the_plain_generator(swarm: Swarm, with_engine: Callable[..., Any]) -> None:
    model, tokenizer = load(swarm, "e00")
    oracles = [ulm.generate(model, tokenizer, prompt, max_tokens=24) for prompt in PROMPTS]

    async def body(engine: Any) -> list[Any]:
        asked = [request(tokenizer, p, {"e00": 1.0}, num_top_logprobs=0) for p in PROMPTS]
        return await asyncio.gather(*(collect(engine, a) for a in asked))

    compared = 0
    for prompt, oracle, (text, tokens, logprobs, last) in zip(
        PROMPTS, oracles, with_engine(body, max_answers=3, max_batch_tokens=4), strict=True
    ):
        num_equal = num_equal_tokens(model, prompt_tokens(tokenizer, prompt), tokens, oracle.tokens)
        compared += num_equal
        assert np.allclose(logprobs[:num_equal], oracle.logprobs[:num_equal], atol=FP32_BATCHING)
        if num_equal == len(oracle.tokens):
            assert (text, last.finish_reason) == (oracle.text, oracle.finish_reason)
    assert compared > 100  # ties end few of them


def test_a_seed_gives_the_same_text_alone_and_in_company(swarm: Swarm, with_engine: Callable[..., Any]) -> None:
    model, tokenizer = load(swarm, "e01")
    sampling = Sampling(temperature=0.9, top_k=40, top_p=0.95, seed=7)
    oracle = ulm.generate(model, tokenizer, "The", max_tokens=24, temperature=0.9, top_k=40, top_p=0.95, seed=7)

    async def body(engine: Any) -> Any:
        asked = request(tokenizer, "The", {"e01": 1.0}, sampling=sampling)
        others = [request(tokenizer, p, {"e01": 1.0}, sampling=Sampling(temperature=1.0, seed=3)) for p in PROMPTS]
        alone = await collect(engine, asked)
        company = (await asyncio.gather(collect(engine, asked), *(collect(engine, o) for o in others)))[0]
        return alone, company

    alone, company = with_engine(body)
    assert alone[0] == company[0] == oracle.text
    assert alone[1] == oracle.tokens


def test_a_stop_string_across_token_borders_is_cut_off(swarm: Swarm, with_engine: Callable[..., Any]) -> None:
    model, tokenizer = load(swarm, "e01")
    full = ulm.generate(model, tokenizer, "The", max_tokens=24)
    middle = len(full.text) // 2
    stop = full.text[middle - 2 : middle + 3]
    oracle: Generated = ulm.generate(model, tokenizer, "The", max_tokens=24, stop=[stop])
    assert oracle.finish_reason == "stop" and oracle.text == full.text[: full.text.index(stop)]

    async def body(engine: Any) -> Any:
        return await collect(engine, request(tokenizer, "The", {"e01": 1.0}, stop=(stop,)))

    text, tokens, _, last = with_engine(body)
    assert (text, tokens, last.finish_reason) == (oracle.text, oracle.tokens, "stop")


def naive_mixture(swarm: Swarm, weights: dict[str, float], prompt: str) -> list[int]:
    """Greedy tokens of a mixture by whole forward passes, one token at a time."""
    loaded = {m: load(swarm, m) for m in weights}
    tokenizer = loaded["e00"][1]
    tokens, start = prompt_tokens(tokenizer, prompt), len(prompt_tokens(tokenizer, prompt))
    for index in range(24):
        with torch.no_grad():
            rows = [model(torch.tensor([tokens]))[0, -1].log_softmax(-1) for model, _ in loaded.values()]
        token = choose(mix_logprobs(torch.stack(rows), torch.tensor(list(weights.values()))), Sampling(), index)
        if token == tokenizer.eot_id:
            break
        tokens.append(token)
    return tokens[start:]


def test_a_mixture_equals_the_sum_of_probabilities(swarm: Swarm, with_engine: Callable[..., Any]) -> None:
    weights = {"e00": 0.5, "e01": 0.3, "e02": 0.2}
    tokenizer = load(swarm, "e00")[1]

    async def body(engine: Any) -> Any:
        return await collect(engine, request(tokenizer, "The value", weights))

    _, tokens, _, _ = with_engine(body)
    assert tokens == naive_mixture(swarm, weights, "The value")


def test_a_mixture_with_weight_one_equals_that_expert(swarm: Swarm, with_engine: Callable[..., Any]) -> None:
    tokenizer = load(swarm, "e00")[1]

    async def body(engine: Any) -> Any:
        single = await collect(engine, request(tokenizer, "def f", {"e02": 1.0}, num_top_logprobs=5))
        mixed = await collect(engine, request(tokenizer, "def f", {"e00": 0.0, "e02": 1.0}, num_top_logprobs=5))
        return single, mixed

    single, mixed = with_engine(body)
    assert single[:3] == mixed[:3]


def test_rows_are_freed_when_a_client_leaves(swarm: Swarm, with_engine: Callable[..., Any]) -> None:
    tokenizer = load(swarm, "e00")[1]

    async def body(engine: Any) -> Any:
        chunks = engine.generate(request(tokenizer, "The", {"e00": 1.0}, max_tokens=80))
        await anext(chunks)
        await chunks.aclose()
        for _ in range(100):
            if (await engine.stats())["running"] == 0:
                return await collect(engine, request(tokenizer, "The", {"e00": 1.0}))
            await asyncio.sleep(0.01)
        return None

    assert with_engine(body, max_answers=1) is not None


def test_score_equals_the_models_own_logprobs(swarm: Swarm, with_engine: Callable[..., Any]) -> None:
    model, tokenizer = load(swarm, "e00")
    tokens = prompt_tokens(tokenizer, "import json\n")

    async def body(engine: Any) -> Any:
        return await engine.score("e00", tokens), [await engine.next_logprobs("e00", tokens[:n]) for n in (3, 4, 5, 5)]

    scores, following = with_engine(body)
    with torch.no_grad():
        logprobs_TV = model(torch.tensor([tokens]))[0].log_softmax(-1)
    assert np.allclose(scores, [float(logprobs_TV[i, t]) for i, t in enumerate(tokens[1:])], atol=FP32_BATCHING)
    for n, row_V in zip((3, 4, 5, 5), following, strict=True):
        assert np.allclose(row_V, logprobs_TV[n - 1].numpy(), atol=FP32_BATCHING)


def test_an_embedding_is_the_mean_of_the_last_states(swarm: Swarm, with_engine: Callable[..., Any]) -> None:
    model, tokenizer = load(swarm, "e00")
    tokens = prompt_tokens(tokenizer, "import json")

    async def body(engine: Any) -> Any:
        return await engine.embed("e00", tokens)

    with torch.no_grad():
        oracle = model.hidden(torch.tensor([tokens]))[0].mean(0)
    assert np.allclose(with_engine(body), oracle.numpy(), atol=FP32_BATCHING)


def test_reload_gives_new_weights_to_new_answers(swarm: Swarm, with_engine: Callable[..., Any]) -> None:
    tokenizer = load(swarm, "e00")[1]
    prompt = prompt_tokens(tokenizer, "The")

    async def body(engine: Any) -> Any:
        before_V = await engine.next_logprobs("e00", prompt)
        under_way = engine.generate(request(tokenizer, "The", {"e00": 1.0}))
        first = await anext(under_way)
        await engine.reload("e00", str(swarm.checkpoint("e01")))
        rest = [token async for chunk in under_way for token in chunk.tokens]
        rows = [before_V, *[await engine.next_logprobs(name, prompt) for name in ("e00", "e01")]]
        after = await collect(engine, request(tokenizer, "The", {"e00": 1.0}))
        other = await collect(engine, request(tokenizer, "The", {"e01": 1.0}))
        return [*first.tokens, *rest], after[1], other[1], rows

    old, after, other, (before_V, after_V, other_V) = with_engine(body)
    assert old == ulm.generate(*load(swarm, "e00"), "The", max_tokens=24).tokens
    assert after == other  # so little trained, they may well be what the old ones would have said, too
    assert np.array_equal(after_V, other_V) and not np.allclose(after_V, before_V, atol=10 * FP32_BATCHING)


def test_an_unloaded_member_and_a_long_prompt_are_refused(swarm: Swarm, with_engine: Callable[..., Any]) -> None:
    tokenizer = load(swarm, "e00")[1]

    async def body(engine: Any) -> None:
        with pytest.raises(ContextLengthError, match="context is 96 tokens"):
            await collect(engine, GenerateRequest((1,) * 96, {"e00": 1.0}, 4))
        await engine.unload("e01")
        assert "e01" not in await engine.members()
        with pytest.raises(ModelNotFoundError, match="no member 'e01'"):
            await collect(engine, request(tokenizer, "a", {"e01": 1.0}))

    with_engine(body)


def test_a_deadline_ends_an_answer_with_what_there_is(swarm: Swarm, with_engine: Callable[..., Any]) -> None:
    tokenizer = load(swarm, "e00")[1]

    async def body(engine: Any) -> Any:
        return await collect(engine, request(tokenizer, "The", {"e00": 1.0}, max_tokens=80, deadline_s=0.0))

    _, tokens, _, last = with_engine(body)
    assert len(tokens) < 80 and last.degraded == "ended by its deadline"
