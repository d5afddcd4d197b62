"""The endpoint as clients meet it: Ray Serve, HTTP, the official openai client."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from typer.testing import CliRunner

import ulm
from serve.contracts import GenerateRequest
from tests.served import endpoint, engine_handle, free_port
from ulm.cli import cluster, status
from ulm.cli.main import app as cli
from ulm.errors import ClusterError, MemberDownError, RequestError
from ulm.models.generate import prompt_tokens
from ulm.swarm.manifest import Swarm

METRICS_TIMEOUT_S = 30.0
FAILED_S = 3.0  # less than any patience: what has failed is said, not waited for


@pytest.fixture(scope="module")
def served(swarm: Swarm) -> Iterator[dict[str, Any]]:
    """The small swarm behind one address, its members in two engines."""
    names = {"aliases": {"gpt-4o": "swarm/route"}, "defaults": {"gpt-4o": {"max_tokens": 3}}}
    with endpoint(swarm=str(swarm.folder), cpus=0.5, members_per_engine=3, **names) as up:
        yield up


@pytest.fixture(scope="module")
def client(served: dict[str, Any]) -> openai.OpenAI:
    return openai.OpenAI(base_url=served["url"], api_key="none", max_retries=0)


def test_the_official_client_lists_the_models(client: openai.OpenAI, served: dict[str, Any]) -> None:
    names = [model.id for model in client.models.list()]
    assert names == served["models"] and {"swarm", "swarm/route", "swarm/mixture", "e00", "seed"} <= set(names)


def test_greedy_tokens_equal_the_plain_generators(client: openai.OpenAI, swarm: Swarm) -> None:
    for member in ("e00", "e01"):
        oracle = ulm.generate(*ulm.load(swarm.checkpoint(member)), "def f(self", max_tokens=16)
        answer = client.completions.create(model=member, prompt="def f(self", max_tokens=16, temperature=0, logprobs=0)
        assert answer.choices[0].text == oracle.text
        assert answer.choices[0].logprobs is not None
        assert answer.choices[0].logprobs.token_logprobs == pytest.approx(oracle.logprobs, abs=2e-5)
        assert answer.usage is not None and answer.usage.completion_tokens == len(oracle.tokens)


@pytest.mark.parametrize("model", ["e00", "swarm"])
def test_a_streamed_chat_equals_the_unstreamed_one(client: openai.OpenAI, model: str) -> None:
    messages: Any = [{"role": "user", "content": "Return a list"}]
    asked: Any = {"model": model, "messages": messages, "max_tokens": 16, "temperature": 0.7, "seed": 11}
    whole = client.chat.completions.create(**asked)
    stream = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage


def test_members_in_two_engines_are_mixed_and_the_ledger_names_them(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="swarm/mixture", prompt="The", max_tokens=6, temperature=0, extra_body={"ulm": {"top_k": 3}}
    )
    ledger = answer.model_extra["ulm"] if answer.model_extra else {}
    assert ledger["strategy"] == "mixture" and {c["member"] for c in ledger["calls"]} == {"e00", "e01", "e02"}
    assert sum(c["weight"] for c in ledger["calls"]) == pytest.approx(1.0, abs=1e-5)


def test_names_defaults_choices_and_embeddings_reach_members_in_other_processes(
    client: openai.OpenAI, swarm: Swarm
) -> None:
    asked: Any = {"model": "gpt-4o", "messages": [{"role": "user", "content": "Return"}]}
    answer = client.chat.completions.create(**asked, n=2, seed=3)
    assert (answer.model, len(answer.choices)) == ("gpt-4o", 2)
    assert answer.usage is not None and answer.usage.completion_tokens <= 6
    (item,) = client.embeddings.create(model="seed", input="import json").data
    model, tokenizer = ulm.load(swarm.checkpoint("seed"))
    with torch.no_grad():
        state_D = model.hidden(torch.tensor([prompt_tokens(tokenizer, "import json")]))[0].mean(0)
    assert item.embedding == pytest.approx((state_D / state_D.norm()).tolist(), abs=1e-5)


def test_every_answer_has_one_request_id_and_a_clients_own_comes_back(served: dict[str, Any]) -> None:
    for path, expected in (("/models", 200), ("/nothing", 404)):
        first, second = (httpx.get(served["url"] + path, trust_env=False) for _ in range(2))
        assert first.status_code == expected
        (one,), (other,) = (answer.headers.get_list("x-request-id") for answer in (first, second))
        assert one != other
    given = httpx.get(served["url"] + "/models", headers={"x-request-id": "mine-1"}, trust_env=False)
    assert given.headers.get_list("x-request-id") == ["mine-1"]


def test_errors_reach_the_client_as_its_own_types(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="nope", prompt="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model="e00", messages=[{"role": "user", "content": "word " * 400}])
    assert long.value.code == "context_length_exceeded"


def test_a_client_that_leaves_frees_its_rows(served: dict[str, Any]) -> None:
    engine = engine_handle()
    body = {"model": "e00", "prompt": ["The"] * 40, "max_tokens": 90, "temperature": 1}  # seconds of work
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{served['url']}/completions", json=body, timeout=0.3, trust_env=False)
    before = engine.stats.remote().result()["generated_tokens"]
    time.sleep(2.0)
    stats = engine.stats.remote().result()
    assert stats["running"] == 0 and stats["waiting"] == 0
    assert stats["generated_tokens"] - before < 40 * 90 / 2


def test_the_metrics_page_has_the_series_of_all_replicas(client: openai.OpenAI, served: dict[str, Any]) -> None:
    client.completions.create(model="e00", prompt="a", max_tokens=2)
    deadline_s = time.monotonic() + METRICS_TIMEOUT_S  # Ray exports every few seconds
    wanted = (
        *("ray_ulm_requests_total", "ray_ulm_memory_resident_bytes", "ray_ulm_ttft_seconds_bucket"),
        *("ray_ulm_engine_answers", "ray_ulm_engine_kv_cache_bytes", "ray_ulm_engine_prompt_tokens_total"),
    )
    page = ""
    while time.monotonic() < deadline_s and not all(name in page for name in wanted):
        page = httpx.get(served["url"].removesuffix("/v1") + "/metrics", trust_env=False).text
        time.sleep(0.5)
    assert [name for name in wanted if name not in page] == []
    line = next(line for line in page.splitlines() if line.startswith("ray_ulm_requests_total{"))
    assert 'outcome="' in line and 'strategy="' in line


def test_the_status_of_the_endpoint_is_read_from_it(
    client: openai.OpenAI, served: dict[str, Any], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        client.completions.create(model="swarm/mixture", prompt="a", max_tokens=2)  # six tokens the other test's
    cluster.remember(root, {**served, "pid": os.getpid()})
    deadline_s, endpoint = time.monotonic() + METRICS_TIMEOUT_S, status.look()["endpoint"]  # Ray exports now and then
    while time.monotonic() < deadline_s and endpoint["models"].get("swarm/mixture", {}).get("generated_tokens", 0) < 10:
        time.sleep(0.5)
        endpoint = status.look()["endpoint"]
    assert endpoint["problem"] is None and endpoint["url"] == served["url"]
    asked = endpoint["models"]["swarm/mixture"]
    assert asked["ok"] >= 2 and asked["generated_tokens"] >= 4 and asked["ttft_count"] >= 2
    assert set(endpoint["engines"]) >= {"engine"} and endpoint["engines"]["engine"]["resident_bytes"] > 0
    assert sum(endpoint["members"].values()) > 0
    done = CliRunner().invoke(cli, ["status", "--once"], env={"COLUMNS": "80"})
    assert done.exit_code == 0 and "swarm/mixture" in done.stderr and max(map(len, done.stderr.splitlines())) <= 80
    assert json.loads(done.stdout.splitlines()[-1])["endpoint"]["url"] == served["url"]
    monkeypatch.setattr(status, "TIMEOUT_S", 0.5)
    cluster.remember(root, {**served, "url": f"http://127.0.0.1:{free_port()}/v1", "pid": os.getpid()})
    assert status.look()["endpoint"]["problem"].startswith("does not answer")


def test_a_port_in_use_is_an_error_with_a_remedy() -> None:
    from serve import door

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ClusterError, match=f"port {port} of 127.0.0.1 cannot be used.*--set port={port + 1}"):
            door.check_port("127.0.0.1", port)


@pytest.mark.slow
def test_what_a_replica_that_cannot_start_said_is_the_reason(served: dict[str, Any], tmp_path: Path) -> None:
    from ray import serve as ray_serve

    from serve import app
    from serve.member import EngineReplica

    bound = EngineReplica.options(name="wrong").bind({"kind": "echo"}, {"a": str(tmp_path)})  # type: ignore[attr-defined]
    try:
        with pytest.raises(RuntimeError, match="Failed to update the deployments"):
            ray_serve.run(bound, name="wrong", route_prefix=None)
        found = app.reason("wrong")
        assert found is not None and str(tmp_path) in found
    finally:
        ray_serve.delete("wrong")


def test_an_engine_whose_process_dies_fails_its_calls_at_once_and_cancelled_calls_end_there(
    served: dict[str, Any], swarm: Swarm
) -> None:
    import ray
    from ray import serve as ray_serve

    from serve.member import EngineReplica, RemoteEngine

    slow = EngineReplica.options(name="slow", ray_actor_options={"num_cpus": 0.5})  # type: ignore[attr-defined]
    bound = slow.bind({"kind": "echo", "delay_ms": 50}, {"e00": str(swarm.checkpoint("e00"))})
    engine = RemoteEngine(ray_serve.run(bound, name="slow", route_prefix=None))
    asked = GenerateRequest((1, 2, 3), {"e00": 1.0}, 80)

    async def body() -> None:
        leaving = [asyncio.create_task(engine._call("generate_whole", asked)) for _ in range(3)]
        stream = engine.generate(asked)
        assert (await anext(stream)).tokens == (1,)
        assert (await engine.stats())["running"] == 4
        for task in leaving:
            task.cancel()
        await asyncio.gather(*leaving, return_exceptions=True)
        async with asyncio.timeout(FAILED_S):
            while (await engine.stats())["running"] > 1:
                await asyncio.sleep(0.05)
        with pytest.raises(RequestError, match="there is no token 9999"):
            await engine.score("e00", (1, 9999))
        (replica,) = [name for name in ray.util.list_named_actors(all_namespaces=True) if "#slow#" in name["name"]]
        whole = asyncio.create_task(engine._call("generate_whole", asked))
        await asyncio.sleep(0.2)
        ray.kill(ray.get_actor(**replica))
        async with asyncio.timeout(FAILED_S):
            with pytest.raises(MemberDownError, match="slow is not there"):
                async for _ in stream:
                    pass
            with pytest.raises(MemberDownError, match="slow is not there"):
                await whole

    try:
        asyncio.run(body())
    finally:
        ray_serve.delete("slow")
