"""The OpenAI surface over engines in this process: shapes, errors, streams, ledgers. No Ray."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from fastapi.testclient import TestClient

import ulm
from serve.api.openai import build_app
from serve.catalog import Catalog
from serve.contracts import Member, SwarmContext
from serve.engines.local.engine import Config, LocalEngine
from ulm.recipes.serve import Budget
from ulm.swarm.manifest import Swarm

Records = list[tuple[str, float, Mapping[str, str]]]


def catalog_of(swarm: Swarm, engines: Mapping[str, LocalEngine], budget: Budget | None = None) -> Catalog:
    members = {}
    for name, entry in swarm.members.items():
        model, tokenizer = ulm.load(swarm.checkpoint(name))
        context = model.spec.context_tokens
        members[name] = Member(name, engines[name], tokenizer, context, entry.cluster, entry.domain)
    context = SwarmContext(swarm.router(), str(swarm.router_folder()))
    return Catalog(members, context, swarm.manifest.strategy, budget or Budget())


@pytest.fixture(scope="module")
def engine(swarm: Swarm) -> Iterator[LocalEngine]:
    made = LocalEngine(Config(kind="local", device="cpu"))
    for name in swarm.members:
        asyncio.run(made.load(name, str(swarm.checkpoint(name))))
    yield made
    asyncio.run(made.close())


@pytest.fixture(scope="module")
def records() -> Records:
    return []


@pytest.fixture(scope="module")
def client(swarm: Swarm, engine: LocalEngine, records: Records) -> Iterator[TestClient]:
    async def metrics() -> str:
        return "ray_ulm_requests_total 1\n"

    catalog = catalog_of(swarm, dict.fromkeys(swarm.members, engine))
    app = build_app(catalog, lambda *record: records.append(record), metrics, started=1_700_000_000)
    with TestClient(app, raise_server_exceptions=False) as made:
        yield made


def complete(client: TestClient, **body: Any) -> Any:
    asked = {"model": "e00", "prompt": "The", "max_tokens": 12, "temperature": 0, **body}
    response = client.post("/v1/completions", json=asked)
    assert response.status_code == 200, response.text
    return response.json()


def events(client: TestClient, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    response = client.post(path, json={**body, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_models_lists_members_and_strategies_with_openais_fields(client: TestClient) -> None:
    listed = client.get("/v1/models").json()
    names = [card["id"] for card in listed["data"]]
    assert names[0] == "swarm"
    assert set(names) == {"swarm", "swarm/mixture", "swarm/route", "swarm/single", "e00", "e01", "e02", "seed"}
    assert listed["data"][0] == {"id": "swarm", "object": "model", "created": 1_700_000_000, "owned_by": "ulm"}
    assert client.get("/v1/models/swarm/route").json()["id"] == "swarm/route"


def test_a_completion_equals_the_plain_generator(client: TestClient, swarm: Swarm) -> None:
    oracle = ulm.generate(*ulm.load(swarm.checkpoint("e00")), "The", max_tokens=12)
    answer = complete(client)
    assert answer["object"] == "text_completion" and answer["id"].startswith("cmpl-")
    assert answer["choices"][0] == {
        "index": 0,
        "text": oracle.text,
        "logprobs": None,
        "finish_reason": oracle.finish_reason,
    }
    num_prompt = len(ulm.load(swarm.checkpoint("e00"))[1].encode("The")) + 1  # <|endoftext|> begins the document
    usage = {"prompt_tokens": num_prompt, "completion_tokens": 12, "total_tokens": num_prompt + 12}
    assert answer["usage"] == usage
    assert answer["ulm"]["calls"][0]["tokens_out"] == 12 and answer["ulm"]["calls"][0]["weight"] == 1.0


@pytest.mark.parametrize("model", ["e00", "swarm/route", "swarm/mixture"])
def test_a_streamed_answer_equals_the_unstreamed_one(client: TestClient, model: str) -> None:
    body = {"model": model, "prompt": "Return the", "max_tokens": 20, "temperature": 0.8, "seed": 5, "logprobs": 2}
    whole = complete(client, **body)
    pieces = events(client, "/v1/completions", body)
    assert "".join(p["choices"][0]["text"] for p in pieces) == whole["choices"][0]["text"]
    streamed = [x for p in pieces for x in p["choices"][0]["logprobs"]["token_logprobs"]]
    assert streamed == whole["choices"][0]["logprobs"]["token_logprobs"]
    offsets = [x for p in pieces for x in p["choices"][0]["logprobs"]["text_offset"]]
    assert offsets == whole["choices"][0]["logprobs"]["text_offset"]
    assert [p["choices"][0]["finish_reason"] for p in pieces][-1] == whole["choices"][0]["finish_reason"] == "length"
    ours, theirs = pieces[-1]["ulm"], whole["ulm"]
    assert [(c["member"], c["weight"]) for c in ours["calls"]] == [(c["member"], c["weight"]) for c in theirs["calls"]]


def test_chat_streams_role_content_finish_and_usage(client: TestClient) -> None:
    body = {"model": "e01", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, "temperature": 0}
    whole = client.post("/v1/chat/completions", json=body).json()
    assert whole["choices"][0]["message"]["role"] == "assistant"
    pieces = events(client, "/v1/chat/completions", {**body, "stream_options": {"include_usage": True}})
    assert pieces[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(p["choices"][0]["delta"].get("content", "") for p in pieces[:-1])
    assert text == whole["choices"][0]["message"]["content"]
    assert pieces[-1]["choices"] == [] and pieces[-1]["usage"] == whole["usage"]
    assert pieces[-1]["ulm"]["strategy"] == "single" and "ulm" not in pieces[-2]


def test_logprobs_are_the_models_own(client: TestClient, swarm: Swarm) -> None:
    model, tokenizer = ulm.load(swarm.checkpoint("e00"))
    oracle = ulm.generate(model, tokenizer, "The", max_tokens=12)
    found = complete(client, logprobs=3)["choices"][0]["logprobs"]
    assert found["token_logprobs"] == pytest.approx(oracle.logprobs, abs=2e-5)
    assert found["tokens"] == [tokenizer.decode([t]) for t in oracle.tokens]
    assert all(
        max(top.values()) == own for top, own in zip(found["top_logprobs"], found["token_logprobs"], strict=True)
    )
    chat = {"model": "e00", "messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 2}
    content = client.post("/v1/chat/completions", json={**chat, "max_tokens": 3}).json()["choices"][0]["logprobs"][
        "content"
    ]
    assert [len(entry["top_logprobs"]) for entry in content] == [2, 2, 2]
    assert all(bytes(entry["bytes"]).decode("utf-8", "replace") == entry["token"] for entry in content)


def test_several_prompts_and_token_prompts(client: TestClient, swarm: Swarm) -> None:
    tokenizer = ulm.load(swarm.checkpoint("e00"))[1]
    both = complete(client, prompt=["The", "def"])
    assert [choice["index"] for choice in both["choices"]] == [0, 1]
    assert both["choices"][1]["text"] == complete(client, prompt="def")["choices"][0]["text"]
    ids = [tokenizer.eot_id, *tokenizer.encode("The")]
    assert complete(client, prompt=ids)["choices"][0]["text"] == both["choices"][0]["text"]
    assert len(both["ulm"]["calls"]) == 2


def test_digits_as_text_stay_text(client: TestClient) -> None:
    assert len(complete(client, prompt=["12", "34"])["choices"]) == 2


def test_a_mixture_reports_the_share_of_each_member(client: TestClient, swarm: Swarm) -> None:
    router = swarm.router()
    assert router is not None
    answer = complete(client, model="swarm/mixture", prompt="import json\ndef decode(self):", max_tokens=6)
    weights = {call["member"]: call["weight"] for call in answer["ulm"]["calls"]}
    assert sum(weights.values()) == pytest.approx(1.0, abs=1e-5) and len(weights) == 2
    w_N = router.weights("import json\ndef decode(self):")
    assert max(weights, key=weights.__getitem__) == router.ids[int(w_N.argmax())]


def test_a_request_can_set_top_k_and_a_budget(client: TestClient) -> None:
    answer = complete(client, model="swarm/mixture", ulm={"top_k": 3, "every_tokens": 2})
    assert len({call["member"] for call in answer["ulm"]["calls"]}) == 3
    answer = complete(client, model="swarm/mixture", ulm={"top_k": 3, "budget": {"max_calls": 1, "max_tokens": 5}})
    assert [call["tokens_out"] for call in answer["ulm"]["calls"]] == [5]
    assert answer["ulm"]["budget"] == {"max_calls": 1, "max_tokens": 5}
    assert any("budget.max_calls" in line for line in answer["ulm"]["degraded"])


def test_members_in_several_engines_answer_as_in_one(swarm: Swarm, engine: LocalEngine, client: TestClient) -> None:
    other = LocalEngine(Config(kind="local", device="cpu"))
    asyncio.run(other.load("e02", str(swarm.checkpoint("e02"))))

    async def metrics() -> str:
        return ""

    engines = {**dict.fromkeys(swarm.members, engine), "e02": other}
    app = build_app(catalog_of(swarm, engines), lambda *_: None, metrics)
    body = {"model": "swarm/mixture", "prompt": "Return", "temperature": 0.7, "seed": 3, "ulm": {"every_tokens": 4}}
    with TestClient(app) as apart:
        ours, theirs = complete(apart, **body), complete(client, **body)
    assert ours["choices"][0]["text"] == theirs["choices"][0]["text"]
    assert [(c["member"], c["tokens_in"], c["tokens_out"], c["why"]) for c in ours["ulm"]["calls"]] == [
        (c["member"], c["tokens_in"], c["tokens_out"], c["why"]) for c in theirs["ulm"]["calls"]
    ]
    asyncio.run(other.close())


REFUSED = [
    ({"model": "nope"}, 404, "model_not_found", "model"),
    ({"prompt": "word " * 500}, 400, "context_length_exceeded", "prompt"),
    ({"prompt": [99_999]}, 400, None, "prompt"),
    ({"temperature": 3}, 400, None, "temperature"),
    ({"temprature": 1}, 400, None, "temprature"),
    ({"n": 2}, 400, None, "n"),
    ({"prompt": []}, 400, None, None),
    ({"prompt": "\ud800"}, 400, None, "prompt"),
    ({"prompt": [True]}, 400, None, "prompt"),
    ({"prompt": "x" * 1_000_000}, 400, "context_length_exceeded", "prompt"),
    ({"prompt": ["a", "b"], "ulm": {"budget": {"max_calls": 1}}}, 400, None, "ulm.budget"),
    ({"frequency_penalty": 0.5}, 400, None, None),
    ({"ulm": {"every_tokens": 3}}, 400, None, "ulm"),  # a single member has no such parameter
    ({"stream_options": {"include_usage": True}}, 400, None, None),
]


@pytest.mark.parametrize(("change", "status", "code", "param"), REFUSED)
def test_wrong_requests_are_refused_in_openais_shape(
    client: TestClient, change: dict[str, Any], status: int, code: str | None, param: str | None
) -> None:
    body = json.dumps({"model": "e00", "prompt": "a", **change})  # spells a lone surrogate as JSON may
    response = client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (status, "invalid_request_error")
    assert error["code"] == code and error["message"]
    assert error["param"] == param


def test_malformed_json_and_unknown_paths_are_refused(client: TestClient) -> None:
    response = client.post("/v1/completions", content=b'{"model": ', headers={"content-type": "application/json"})
    assert response.status_code == 400 and "not JSON" in response.json()["error"]["message"]
    assert client.get("/v1/nothing").json()["error"]["type"] == "invalid_request_error"
    for body in (b"x" * (5 << 20), iter([b"x" * (1 << 20)] * 5)):  # the second is sent in chunks, without a length
        too_long = client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
        assert (too_long.status_code, too_long.json()["error"]["type"]) == (413, "invalid_request_error")


def test_a_refusal_of_a_stream_is_a_status_and_not_an_event(client: TestClient) -> None:
    body = {"model": "e00", "prompt": "word " * 500, "stream": True}
    assert client.post("/v1/completions", json=body).status_code == 400


def test_requests_are_recorded_by_model_strategy_and_outcome(client: TestClient, records: Records) -> None:
    from ulm.metrics import METRICS

    records.clear()
    complete(client, model="swarm/mixture", max_tokens=4)
    client.post("/v1/completions", json={"model": "e00", "prompt": "word " * 500})
    requests = [tags for name, _, tags in records if name == "ulm_requests_total"]
    assert requests == [
        {"model": "swarm/mixture", "strategy": "mixture", "outcome": "ok"},
        {"model": "e00", "strategy": "single", "outcome": "refused"},
    ]
    generated = [v for name, v, tags in records if name == "ulm_tokens_total" and tags["kind"] == "generated"]
    assert generated == [4]
    for name, _, tags in records:
        assert set(tags) == set(METRICS[name].tags)
    assert {"ulm_ttft_seconds", "ulm_member_weight", "ulm_request_seconds"} <= {name for name, _, _ in records}


def test_health_readiness_and_metrics(client: TestClient) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"status": "ready"}
    assert "ray_ulm_requests_total" in client.get("/metrics").text
