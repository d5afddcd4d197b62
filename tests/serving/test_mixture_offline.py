"""Mixtures as they are served, over models in one engine and in two, against the same sums made offline."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import ulm
from serve.contracts import GenerateRequest, Ledger, Member, SwarmContext, TokenChunk
from serve.engines.local.engine import Config, LocalEngine
from serve.strategies.mixture import Mixture
from ulm import registry
from ulm.models.sampling import Sampling
from ulm.recipes.serve import Budget
from ulm.swarm.manifest import Swarm
from ulm.swarm.mixture import mix_logprobs
from ulm.swarm.routing import By, chosen, weigh

FLOAT32_MIXTURE = 1e-4  # nats: cached and whole passes in float32 differ by less, and so do the weights that follow
NUM_TOKENS = 22
PROMPT = "Return the value of"
SAMPLING: dict[str, Any] = {"temperature": 0.9, "seed": 4}
NEVER = -100.0  # a bias under which no answer ends early
Served = Callable[..., tuple[TokenChunk, Ledger]]


@pytest.fixture(scope="module")
def served(swarm: Swarm) -> Iterator[Served]:
    """An answer of `mixture` over members of which `apart` have an engine of their own."""
    engines = [LocalEngine(Config(kind="local", device="cpu", threads=1, compile_after_steps=None)) for _ in range(2)]
    for engine in engines:
        for name in swarm.members:
            asyncio.run(engine.load(name, str(swarm.checkpoint(name))))

    def answer(apart: tuple[str, ...] = (), order: tuple[str, ...] = (), **options: Any) -> tuple[TokenChunk, Ledger]:
        members = {}
        for name in order or tuple(swarm.members):
            model, tokenizer = ulm.load(swarm.checkpoint(name))
            members[name] = Member(name, engines[name in apart], tokenizer, model.spec.context_tokens)
        tokenizer = members["e00"].tokenizer
        asked = GenerateRequest(
            (tokenizer.eot_id, *tokenizer.encode(PROMPT)),
            {},
            NUM_TOKENS,
            sampling=Sampling(**SAMPLING, logit_bias=((tokenizer.eot_id, NEVER),)),
            num_top_logprobs=0,
        )
        mixture = Mixture(registry.configure("strategy", {"kind": "mixture", **options}))

        async def run() -> tuple[TokenChunk, Ledger]:
            chunks = [c async for c in mixture.answer(asked, members, SwarmContext(swarm.router()), Budget())]
            return TokenChunk.joined(chunks[:-1]), chunks[-1]

        return asyncio.run(run())

    yield answer
    for engine in engines:
        asyncio.run(engine.close())


@torch.no_grad()
def offline(swarm: Swarm, answer: TokenChunk, every_tokens: int, top_k: int, by: By) -> list[float]:
    """The mixture's logprob of each token of an answer, from whole passes: weights of a window from what is before."""
    router = swarm.router()
    assert router is not None
    tokenizer = ulm.load(swarm.checkpoint("e00"))[1]
    prompt = [tokenizer.eot_id, *tokenizer.encode(PROMPT)]
    tokens = [*prompt, *answer.tokens]
    logprobs_NTV = torch.stack(
        [ulm.load(swarm.checkpoint(name))[0](torch.tensor([tokens]))[0].float().log_softmax(-1) for name in router.ids]
    )
    of_text_NT = logprobs_NTV[:, :-1].gather(-1, torch.tensor(tokens[1:]).expand(len(router.ids), -1)[..., None])[
        ..., 0
    ]
    found = []
    for at in range(len(prompt), len(tokens)):
        window = len(prompt) + (at - len(prompt)) // every_tokens * every_tokens
        nats_N = of_text_NT[:, : window - 1].double().sum(-1).numpy()
        weight_N = chosen(weigh(router, router.weights(tokenizer.decode(tokens[:window])), by, nats_N), top_k)
        mixed_V = mix_logprobs(logprobs_NTV[:, at - 1], torch.from_numpy(weight_N))
        found.append(float(mixed_V[tokens[at]]))
    return found


@pytest.mark.parametrize("apart", [(), ("e01", "e02")], ids=["one engine", "two engines"])
@pytest.mark.parametrize("by", ["clusterer", "likelihood", "product"])
@pytest.mark.parametrize(("every_tokens", "top_k"), [(64, 2), (3, 3)])
def test_a_served_mixture_is_the_one_computed_offline(
    swarm: Swarm, served: Served, apart: tuple[str, ...], by: By, every_tokens: int, top_k: int
) -> None:
    answer, _ = served(apart, every_tokens=every_tokens, top_k=top_k, by=by)
    assert len(answer.tokens) == len(answer.logprobs) == NUM_TOKENS
    logprobs = [entry.logprob for entry in answer.logprobs]
    np.testing.assert_allclose(logprobs, offline(swarm, answer, every_tokens, top_k, by), atol=FLOAT32_MIXTURE, rtol=0)


def test_a_mixture_of_one_is_that_expert(swarm: Swarm, served: Served) -> None:
    answer, ledger = served(top_k=1)
    (call,) = ledger.calls
    assert call.weight == 1.0 and call.tokens_out == NUM_TOKENS
    model, tokenizer = ulm.load(swarm.checkpoint(call.member))
    never = {tokenizer.eot_id: NEVER}
    oracle = ulm.generate(model, tokenizer, PROMPT, max_tokens=NUM_TOKENS, logit_bias=never, **SAMPLING)
    assert list(answer.tokens) == oracle.tokens
    np.testing.assert_allclose([e.logprob for e in answer.logprobs], oracle.logprobs, atol=FLOAT32_MIXTURE, rtol=0)


@pytest.mark.parametrize("apart", [(), ("e00",)], ids=["one engine", "two engines"])
def test_the_order_of_members_changes_nothing(served: Served, apart: tuple[str, ...]) -> None:
    found = []
    for order in (("e00", "e01", "e02", "seed"), ("seed", "e02", "e00", "e01")):
        answer, ledger = served(apart, order, every_tokens=4, top_k=3, by="product")
        spent = [(call.member, call.tokens_out, call.weight) for call in ledger.calls]
        found.append((answer.tokens, [entry.logprob for entry in answer.logprobs], spent))
    assert found[0] == found[1]
