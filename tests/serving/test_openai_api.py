"""The OpenAI surface over engines in this process: shapes, errors, streams, ledgers. No Ray."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import jsonschema
import pytest
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient

import ulm
from serve.api.access import Visit
from serve.api.answering import Answering
from serve.api.answers import ChatShape, CompletionShape
from serve.api.prompts import Chat
from serve.api.schema import ChatBody, CompletionBody
from serve.contracts import GenerateRequest, TokenChunk
from serve.engines.echo import Config as EchoConfig
from serve.engines.echo import EchoEngine
from serve.engines.local.engine import Config, LocalEngine
from tests.openai_api import STARTED, Records, catalog_of, client_of, complete, echoes, events
from ulm import registry
from ulm.errors import MemberDownError, OverloadedError
from ulm.recipes.serve import Limits
from ulm.swarm.manifest import SEED, Swarm


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
    with client_of(catalog_of(swarm, dict.fromkeys(swarm.members, engine)), records) as made:
        yield made


def test_models_lists_members_and_strategies_with_openais_fields(client: TestClient) -> None:
    listed = client.get("/v1/models").json()
    names = [card["id"] for card in listed["data"]]
    assert names[0] == "swarm"
    strategies = {f"swarm/{kind}" for kind in registry.kinds("strategy")}
    assert set(names) == {"swarm", *strategies, "e00", "e01", "e02", "seed"}
    card = {"id": "swarm", "object": "model", "created": STARTED, "owned_by": "ulm"}
    assert listed["data"][0] == {**card, "root": "swarm", "max_model_len": 96}
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


def test_the_prompts_of_a_request_share_its_budget(client: TestClient) -> None:
    for limit, most in (("max_tokens", 9), ("max_calls", 2)):
        answer = complete(client, prompt=["The", "def", "import"], max_tokens=6, ulm={"budget": {limit: most}})
        calls = answer["ulm"]["calls"]
        spent = {"max_tokens": sum(call["tokens_out"] for call in calls), "max_calls": len(calls)}
        assert spent[limit] == most and answer["ulm"]["budget"] == {limit: most}
        assert len(answer["choices"]) == 3 and answer["choices"][2]["text"] == ""
        assert f"ended after 0 tokens by budget.{limit}" in answer["ulm"]["degraded"]
        assert answer["usage"]["completion_tokens"] == spent["max_tokens"]


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

    engines = {**dict.fromkeys(swarm.members, engine), "e02": other}
    body = {"model": "swarm/mixture", "prompt": "Return", "temperature": 0.7, "seed": 3, "ulm": {"every_tokens": 4}}
    with client_of(catalog_of(swarm, engines)) as apart:
        ours, theirs = complete(apart, **body), complete(client, **body)
    assert ours["choices"][0]["text"] == theirs["choices"][0]["text"]
    assert [(c["member"], c["tokens_in"], c["tokens_out"], c["why"]) for c in ours["ulm"]["calls"]] == [
        (c["member"], c["tokens_in"], c["tokens_out"], c["why"]) for c in theirs["ulm"]["calls"]
    ]
    asyncio.run(other.close())


def json_schema(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, **more}}


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {"not": schema}
    return schema


REFUSED = [
    ({"model": "nope"}, 404, "model_not_found", "model"),
    ({"prompt": "word " * 500}, 400, "context_length_exceeded", "prompt"),
    ({"prompt": [99_999]}, 400, None, "prompt"),
    ({"temperature": 3}, 400, None, "temperature"),
    ({"temprature": 1}, 400, None, "temprature"),
    ({"n": 2, "temperature": 0}, 400, None, "n"),
    ({"n": 0}, 400, None, "n"),
    ({"best_of": 2, "n": 3, "temperature": 1}, 400, None, "best_of"),
    ({"best_of": 2, "stream": True, "temperature": 1}, 400, None, "best_of"),
    ({"max_tokens": 0}, 400, None, "max_tokens"),
    ({"logit_bias": {"99999": 1}}, 400, None, "logit_bias"),
    ({"logit_bias": {"1": 101}}, 400, None, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, 400, None, "logit_bias"),
    ({"logit_bias": {"a": 1}}, 400, None, "logit_bias"),
    ({"suffix": "b"}, 400, None, "suffix"),
    ({"min_p": 0.5, "temperature": 0}, 400, None, "min_p"),
    ({"echo": True, "logprobs": 1, "stream": True, "n": 2, "temperature": 1}, 400, None, None),
    ({"response_format": {"type": "grammar"}}, 400, None, "response_format"),
    ({"response_format": {"type": "json_schema"}}, 400, None, "response_format"),
    (
        {"response_format": {"type": "json_object", "json_schema": {"name": "a", "schema": {}}}},
        400,
        None,
        "response_format",
    ),
    ({"response_format": json_schema({}, name="a b")}, 400, None, "response_format"),
    ({"response_format": json_schema({}, oops=1)}, 400, None, "response_format"),
    ({"response_format": json_schema({"oops": 1})}, 400, None, "response_format"),
    ({"response_format": json_schema({"minimum": float("nan")})}, 400, None, "response_format"),
    ({"response_format": json_schema({"type": "integer", "minimum": 2, "maximum": 1})}, 400, None, "response_format"),
    ({"response_format": json_schema(deep(700))}, 400, None, "response_format"),
    ({"response_format": json_schema({"const": "\ud800"})}, 400, None, "response_format"),
    ({"response_format": json_schema({}), "echo": True}, 400, None, "echo"),
    ({"prompt": []}, 400, None, None),
    ({"prompt": "\ud800"}, 400, None, "prompt"),
    ({"prompt": [True]}, 400, None, "prompt"),
    ({"prompt": "x" * 1_000_000}, 400, "context_length_exceeded", "prompt"),
    ({"frequency_penalty": 2.5}, 400, None, "frequency_penalty"),
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


POINT = {"type": "object", "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["x"]}
CLOSED = {**POINT, "additionalProperties": False}


def test_answers_are_json_of_their_schema_in_all_three_forms(client: TestClient) -> None:
    drawn = {"temperature": 1, "seed": 1, "n": 3, "max_tokens": 40}
    several = complete(client, model="swarm/mixture", response_format=json_schema(CLOSED, strict=False), **drawn)
    for choice in several["choices"]:
        jsonschema.validate(json.loads(choice["text"]), CLOSED)
        assert choice["finish_reason"] == "stop"
    chat = {"model": "swarm", "messages": [{"role": "user", "content": "a"}], "logit_bias": {"1": -1}}
    said = events(client, "/v1/chat/completions", {**chat, "response_format": json_schema(CLOSED)})
    text = "".join(event["choices"][0]["delta"].get("content") or "" for event in said if event["choices"])
    jsonschema.validate(json.loads(text), CLOSED)
    free = client.post(
        "/v1/chat/completions", json={**chat, "max_tokens": 3, "response_format": {"type": "json_object"}}
    )
    assert free.json()["choices"][0]["message"]["content"].startswith("{")
    named = {"type": "json_schema", "name": "point", "schema": {**CLOSED, "default": None}}
    asked = {"model": "e00", "input": "a", "text": {"format": named}}
    response = client.post("/v1/responses", json=asked).json()
    jsonschema.validate(json.loads(response["output"][0]["content"][0]["text"]), CLOSED)
    assert response["status"] == "completed" and response["text"] == {"format": named}
    for wrong in (
        {"type": "json_schema", "name": "a"},
        {**named, "schema": {"oops": 1}},
        {"type": "text", "name": "a"},
    ):
        refused = client.post("/v1/responses", json={**asked, "text": {"format": wrong}})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "text.format")
        assert refused.json()["error"]["message"].startswith("text.format")


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


# ---- several choices, options, members that are down; with echoes in the members' place


class Down(EchoEngine):
    """An engine whose process is gone, from the n-th token of an answer on."""

    num_tokens = 0

    async def generate(self, request: GenerateRequest) -> AsyncIterator[TokenChunk]:
        """So many tokens, if any; of an answer in one piece none."""
        left = self.num_tokens if request.stream else 0
        async for chunk in super().generate(request):
            if not left:
                raise MemberDownError("engine-0 is not there")
            left -= 1
            yield chunk

    async def members(self) -> Any:
        """Not even that."""
        raise MemberDownError("engine-0 is not there")


def test_a_broadcast_gives_one_choice_a_member_and_a_prompt_whole_and_streamed(client: TestClient) -> None:
    body = {"model": "swarm/broadcast", "prompt": ["The", "def f"], "logprobs": 1, "ulm": {"members": ["e01", "e02"]}}
    whole = complete(client, **body)
    asked = [{"prompt": prompt, "model": member} for prompt in body["prompt"] for member in ("e01", "e02")]
    singles = [complete(client, logprobs=1, **one) for one in asked]
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in whole["choices"]] == [one["choices"][0]["text"] for one in singles]
    num_prompt, num_out = ([one["usage"][name] for one in singles] for name in ("prompt_tokens", "completion_tokens"))
    assert whole["usage"]["prompt_tokens"] == num_prompt[0] + num_prompt[2], "each prompt once"
    assert whole["usage"]["completion_tokens"] == sum(num_out)
    pieces = events(client, "/v1/completions", {"max_tokens": 12, "temperature": 0, **body})
    for choice in whole["choices"]:
        mine = [p["choices"][0] for p in pieces if p["choices"][0]["index"] == choice["index"]]
        assert "".join(p["text"] for p in mine) == choice["text"]
        assert [x for p in mine for x in p["logprobs"]["text_offset"]] == choice["logprobs"]["text_offset"]
        assert [p["finish_reason"] for p in mine if p["finish_reason"]] == [choice["finish_reason"]]
    assert ["ulm" in piece for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def test_each_choice_of_a_streamed_chat_opens_with_its_role(client: TestClient) -> None:
    body = {"model": "swarm/broadcast", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    pieces = events(client, "/v1/chat/completions", {**body, "stream_options": {"include_usage": True}})
    opened: set[int] = set()
    for piece in pieces[:-1]:
        (choice,) = piece["choices"]
        assert ("role" in choice["delta"]) == (choice["index"] not in opened)
        opened.add(choice["index"])
    assert opened == {0, 1, 2, 3} and pieces[-1]["usage"]["completion_tokens"] > 4
    assert pieces[-1]["ulm"]["strategy"] == "broadcast"


OPTIONS = [
    ("swarm/route", {"every_tokens": 2, "margin": 1.0, "top_k": 2, "by": "likelihood"}, None),
    ("swarm/mixture", {"by": "product", "top_k": 2}, None),
    ("swarm/fallback", {"members": ["e02", "e00"]}, None),
    ("swarm/mixture", {"margin": 0.5}, "margin: unknown key"),
    ("e00", {"members": ["e01"]}, "members: unknown key"),
    ("swarm/broadcast", {"members": ["e01", "e09"]}, "ulm: these options need the member 'e09'"),
    ("swarm/broadcast", {"members": ["e01", "e01"]}, "members names one twice"),
    ("swarm/mixture", {"by": "magic"}, "ulm"),
    ("swarm/mixture", {"top_k": 3}, "ulm.top_k: 3 is beyond this endpoint's limit, which is 2"),
    ("swarm/route", {"every_tokens": 1}, "ulm.every_tokens: 1 is beyond this endpoint's limit, which is 2"),
]


@pytest.mark.parametrize(("model", "options", "problem"), OPTIONS)
def test_options_are_the_strategys_within_the_operators_limits(
    swarm: Swarm, model: str, options: dict[str, Any], problem: str | None
) -> None:
    catalog = catalog_of(swarm, echoes(swarm), limits=Limits(max_top_k=2, min_every_tokens=2))
    body = {"model": model, "prompt": "The value of", "max_tokens": 6, "ulm": options}
    response = client_of(catalog).post("/v1/completions", json=body)
    if problem is None:
        assert response.status_code == 200, response.text
        assert set(response.json()["ulm"]["calls"][0]) >= {"member", "tokens_in", "tokens_out", "ms", "weight", "why"}
    else:
        assert response.status_code == 400 and problem in response.json()["error"]["message"], response.text
        assert response.json()["error"]["param"].startswith("ulm")


def test_a_strategys_defaults_keep_to_the_limits(swarm: Swarm) -> None:
    catalog = catalog_of(swarm, echoes(swarm), limits=Limits(max_top_k=2, min_every_tokens=100))
    assert catalog.model("swarm/route").strategy.config.every_tokens == 100  # type: ignore[attr-defined]
    assert catalog.model("swarm/mixture").strategy.config.top_k == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize("num_tokens", [0, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_where_a_member_is_down_another_goes_on_and_the_ledger_and_the_metrics_say_so(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch, num_tokens: int, stream: bool
) -> None:
    monkeypatch.setattr(Down, "num_tokens", num_tokens)
    records: Records = []
    client = client_of(catalog_of(swarm, echoes(swarm, Down, ("e01",))), records)
    body = {"model": "swarm/fallback", "prompt": "one two three ", "max_tokens": 9}
    options = {"members": ["e01", "e02"]}
    if stream:
        pieces = events(client, "/v1/completions", {**body, "ulm": options})
        text, ledger = "".join(piece["choices"][0]["text"] for piece in pieces), pieces[-1]["ulm"]
    else:
        answer = complete(client, **body, ulm=options)
        text, ledger = answer["choices"][0]["text"], answer["ulm"]
    alone = complete(client_of(catalog_of(swarm, echoes(swarm))), **{**body, "model": "e02"})
    assert text == alone["choices"][0]["text"]
    in_stream = num_tokens if stream else 0  # in one piece, what it had said is lost with it
    assert [(c["member"], c["tokens_out"]) for c in ledger["calls"]] == [("e01", in_stream), ("e02", 9 - in_stream)]
    assert ledger["degraded"] == ["e01 failed: engine-0 is not there"]
    counted = {(name, *tags.values()): value for name, value, tags in records if name.startswith("ulm_swarm_")}
    assert counted == {
        ("ulm_swarm_calls_total", "fallback", "e01", "asked"): 1,
        ("ulm_swarm_calls_total", "fallback", "e02", "fallback"): 1,
        ("ulm_swarm_call_tokens_total", "fallback", "e01"): in_stream,
        ("ulm_swarm_call_tokens_total", "fallback", "e02"): 9 - in_stream,
        ("ulm_swarm_degraded_total", "fallback", "member_down"): 1,
    }


@pytest.mark.parametrize("model", ["e00", "swarm", "swarm/route", "swarm/broadcast"])
@pytest.mark.parametrize("stream", [False, True])
def test_where_nobody_is_up_the_answer_is_503_with_the_seconds_to_wait(swarm: Swarm, model: str, stream: bool) -> None:
    client = client_of(catalog_of(swarm, echoes(swarm, Down, tuple(swarm.members))))
    for path, prompt in (
        ("/v1/completions", {"prompt": "The"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
    ):
        response = client.post(path, json={"model": model, "stream": stream, **prompt})
        assert response.status_code == 503, response.text
        assert 1 <= int(response.headers["retry-after"]) <= 60
        assert response.json()["error"]["type"] == "server_error"


def test_readiness_names_members_whose_engine_is_down(swarm: Swarm) -> None:
    response = client_of(catalog_of(swarm, echoes(swarm, Down, ("e01", SEED)))).get("/readyz")
    assert (response.status_code, response.json()) == (503, {"status": "not ready", "missing": ["e01", SEED]})


def test_what_budgets_and_deadlines_cut_is_counted_by_a_word(swarm: Swarm) -> None:
    records: Records = []
    client = client_of(catalog_of(swarm, echoes(swarm)), records)
    for budget in ({"max_calls": 1}, {"max_tokens": 5}, {"max_calls": 1, "max_tokens": 1}):
        complete(client, model="swarm/mixture", max_tokens=8, ulm={"top_k": 2, "budget": budget})
    counted = [tags for name, _, tags in records if name == "ulm_swarm_degraded_total"]
    assert len(counted) >= 3 and all(tags == {"strategy": "mixture", "why": "budget"} for tags in counted)


HOSTILE = [
    *(
        (name, value)
        for name in ("top_k", "every_tokens")
        for value in ("-1", "0", "NaN", "1e400", "1.5", "true", "[]")
    ),
    *(("margin", value) for value in ("-0.1", "1.1", "NaN", "-Infinity", "true", '"1"', "{}")),
    *((f"budget.{n}", v) for n in ("max_calls", "max_tokens", "max_ms") for v in ("0", "NaN", "1.5", '"9"', "true")),
    *(("members", value) for value in ('"e00"', "[]", json.dumps(["e00"] * 100), '{"e00": 1}')),
    *(("by", value) for value in ("1", '"magic"', '"\\ud800"')),
    *(("budget", "[]"), ("budget.max_cals", "1"), ("patience_s", "1"), ("kind", '"single"')),
]


@pytest.mark.parametrize("model", ["swarm/route", "swarm/broadcast"])
def test_hostile_options_are_refused_by_the_name_of_the_field(swarm: Swarm, model: str) -> None:
    client = client_of(catalog_of(swarm, echoes(swarm)))
    for name, value in HOSTILE:
        outer, _, inner = name.partition(".")
        options = f'{{"{outer}": {{"{inner}": {value}}}}}' if inner else f'{{"{outer}": {value}}}'
        body = f'{{"model": "{model}", "prompt": "The", "max_tokens": 3, "ulm": {options}}}'
        response = client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
        assert response.status_code == 400, (options, response.text)
        error = response.json()["error"]
        assert error["param"] == f"ulm.{name}" and error["message"].startswith(f"ulm.{name}: "), options
        assert len(error["message"]) < 500


@pytest.mark.parametrize("model", ["swarm/route", "swarm/mixture", "swarm/broadcast", "e00"])
def test_numbers_beyond_all_bounds_bound_nothing(swarm: Swarm, model: str) -> None:
    client = client_of(catalog_of(swarm, echoes(swarm)))
    options: dict[str, Any] = {"budget": {"max_tokens": 10**400, "max_calls": 10**400}}
    if model in ("swarm/route", "swarm/mixture"):
        options |= {"top_k": 10**400, "every_tokens": 10**400}
    answer = complete(client, model=model, max_tokens=5, ulm=options)
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"} and not answer["ulm"]["degraded"]
    assert answer["usage"]["completion_tokens"] == 5 * len(answer["choices"])


def test_a_client_that_leaves_at_the_first_event_ends_every_call_at_once(swarm: Swarm) -> None:
    engine = EchoEngine(EchoConfig(kind="echo", delay_ms=20))
    for name in swarm.members:
        asyncio.run(engine.load(name, str(swarm.checkpoint(name))))
    answering = Answering(catalog_of(swarm, dict.fromkeys(swarm.members, engine)), lambda *_: None)

    async def body() -> None:
        asked = {"model": "swarm/broadcast", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
        chat = ChatBody.model_validate(asked)
        response = await answering.respond(chat, [Chat(chat.plain())], ChatShape, Visit())
        assert isinstance(response, StreamingResponse)
        events: Any = response.body_iterator
        assert "assistant" in str(await anext(events))  # the role, before the first chunk is passed on
        assert (await engine.stats())["running"] == len(swarm.members)
        await events.aclose()
        assert (await engine.stats())["running"] == 0

    asyncio.run(body())


def test_a_client_that_leaves_before_the_answer_is_counted_as_such(swarm: Swarm) -> None:
    records: Records = []
    slow = EchoEngine(EchoConfig(kind="echo", delay_ms=60_000))
    asyncio.run(slow.load("e00", str(swarm.checkpoint("e00"))))
    catalog = catalog_of(swarm, {**echoes(swarm), "e00": slow})
    answering = Answering(catalog, lambda *record: records.append(record))

    async def body() -> None:
        asked = CompletionBody.model_validate({"model": "e00", "prompt": "The"})
        waiting = asyncio.create_task(answering.respond(asked, ["The"], CompletionShape, Visit()))
        await asyncio.sleep(0.05)
        assert (await slow.stats())["running"] == 1
        waiting.cancel()
        await asyncio.wait([waiting])
        assert waiting.cancelled() and (await slow.stats())["running"] == 0

    asyncio.run(body())
    assert [tags["outcome"] for name, _, tags in records if name == "ulm_requests_total"] == ["cancelled"]


def test_who_is_overloaded_is_counted_by_a_word_of_its_own(swarm: Swarm) -> None:
    class Busy(Down):
        async def generate(self, request: GenerateRequest) -> AsyncIterator[TokenChunk]:
            """Refuses."""
            raise OverloadedError("9 requests are waiting already")
            yield

    records: Records = []
    client = client_of(catalog_of(swarm, echoes(swarm, Busy, ("e01",))), records)
    for _ in range(2):  # the second finds it up
        answer = complete(client, model="swarm/fallback", ulm={"members": ["e01", "e02"]})
        assert answer["ulm"]["degraded"] == ["e01 is overloaded: 9 requests are waiting already"]
    counted = [tags["why"] for name, _, tags in records if name == "ulm_swarm_degraded_total"]
    assert counted == ["member_busy"] * 2
