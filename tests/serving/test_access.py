"""Keys and limits at the endpoint, without Ray: who gets in, what is counted, what is told, and what is never told."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi.testclient import TestClient

import ulm
from serve import accounts
from serve.accounts import Accounts, Admitted
from serve.api import refusals
from serve.api.access import Guard, scope_of
from serve.api.refusals import MAX_BODY_BYTES
from serve.api.request_log import RequestLog
from serve.engines.echo import Config, EchoEngine
from serve.store import Store
from tests.openai_api import Records, catalog_of, client_of, echoes
from ulm.errors import ConfigError, MemberDownError, UnavailableError
from ulm.metrics import METRICS
from ulm.recipes.serve import Cors
from ulm.swarm.manifest import Swarm


@dataclass
class Near:
    """The accounts in this process, as a gateway has them of an actor elsewhere."""

    accounts: Accounts
    is_down: bool = False
    open: list[str] = field(default_factory=list)
    told: list[tuple[str | None, str, int]] = field(default_factory=list)
    reserved: int = 0  # last

    def _check(self) -> None:
        if self.is_down:
            raise UnavailableError("Keys can not be checked just now; ask again in a moment")

    async def admit(self, authorization: str | None, scope: str) -> Admitted:
        self._check()
        return self.accounts.admit(authorization, scope)

    async def reserve(self, key_id: str, tokens: int) -> tuple[str, dict[str, str]]:
        self._check()
        name = f"{key_id}{len(self.open)}"
        headers = self.accounts.reserve(key_id, name, tokens)
        self.reserved = tokens
        self.open.append(name)
        return name, headers

    async def settle(self, reservation: str, used: int) -> None:
        self._check()
        self.accounts.settle(reservation, used)

    def later(self, reservation: str | None, key_id: str, used: int) -> None:
        self.told.append((reservation, key_id, used))
        if reservation is not None:
            self.accounts.settle(reservation, used)
        else:
            self.accounts.note(key_id, used)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store.open(f"sqlite:///{tmp_path / 'state.db'}")
    yield opened
    opened.close()


@pytest.fixture
def near(store: Store) -> Near:
    return Near(Accounts(store))


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "requests.jsonl"


@pytest.fixture
def records() -> Records:
    return []


@pytest.fixture
def client(swarm: Swarm, near: Near, log: Path, records: Records) -> TestClient:
    guard = Guard(near, log=RequestLog(log), cors=Cors(origins=("https://a.example",)))
    catalog = catalog_of(swarm, echoes(swarm), aliases={"gpt-4o": "swarm/route", "first": "e00"})
    return client_of(catalog, records, guard=guard)


def make(store: Store, **fields: Any) -> tuple[str, dict[str, str]]:
    """A key's id, and the headers that it is sent in."""
    key = accounts.create(store, **{"name": "a", "scopes": ["infer"], **fields})
    return key.id, {"Authorization": f"Bearer {key.text}"}


def used(store: Store, key_id: str) -> int:
    return int(accounts.listed(store, key_id)[0]["used_tokens"])


ASKED = {"model": "e00", "prompt": "a b c a b c", "max_tokens": 5, "temperature": 0}


# ---- who gets in


def test_without_a_key_the_answer_is_openais_401_before_the_body_is_read(client: TestClient) -> None:
    for headers in ({}, {"Authorization": "Bearer none"}, {"Authorization": "Bearer ulm-aaaaaaaaaaaa-" + "b" * 32}):
        refused = client.post("/v1/completions", content=b"{not json", headers=headers)
        assert refused.status_code == 401 and refused.headers["WWW-Authenticate"] == "Bearer"
        error = refused.json()["error"]
        assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", "invalid_api_key", None)


def test_two_authorization_headers_are_refused_even_where_one_is_right(client: TestClient, store: Store) -> None:
    _, headers = make(store)
    twice = [("Authorization", headers["Authorization"]), ("Authorization", "Bearer other")]
    refused = client.get("/v1/models", headers=twice)
    assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
    assert "more than one header Authorization" in refused.json()["error"]["message"]


def test_a_mis_copied_key_is_told_what_is_wrong_and_nothing_of_it(client: TestClient, store: Store) -> None:
    key_id, headers = make(store)
    key = headers["Authorization"].removeprefix("Bearer ")
    for sent, problem in (
        (key, "without the word Bearer"),
        (f"Bearer {key[:-1]}", "it has 48 characters, and keys have 49"),
        (f"Bearer sk-{key}", "not of this endpoint, whose keys begin with ulm-"),
    ):
        refused = client.get("/v1/models", headers={"Authorization": sent})
        error = refused.json()["error"]
        assert (refused.status_code, error["code"]) == (401, "invalid_api_key") and problem in error["message"]
        assert key_id not in refused.text and key[-20:-1] not in refused.text and "sk-" not in refused.text


def test_every_path_is_behind_a_scope_or_listed_as_open(client: TestClient, store: Store) -> None:
    app: Any = client.app
    wanted = {path: scope_of(path) for path in [*app.openapi()["paths"], "/docs", "/openapi.json", "/redoc"]}
    assert {path for path, scope in wanted.items() if scope is None} == {
        "/healthz",
        "/readyz",
        "/docs",
        "/openapi.json",
    }
    assert {path for path, scope in wanted.items() if scope == "admin"} == {"/metrics", "/redoc"}
    _, infer = make(store)
    _, admin = make(store, scopes=["admin"])
    for path in ("/healthz", "/readyz", "/docs", "/openapi.json"):
        assert client.get(path).status_code == 200
    for path in ("/metrics", "/anything", "/v1/files", "//v1/models", "/v1//models", "/tokenize/", "/V1/models"):
        assert client.get(path).status_code == 401
        refused = client.get(path, headers=infer)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "insufficient_permissions")
    assert client.get("/metrics", headers=admin).status_code == 200
    assert client.get("/v1/models", headers=admin).status_code == 403


def test_a_key_sees_and_asks_its_models_alone(client: TestClient, store: Store) -> None:
    _, headers = make(store, models=["e00", "gpt-4o"])
    listed = [card["id"] for card in client.get("/v1/models", headers=headers).json()["data"]]
    assert listed == ["e00", "first", "gpt-4o"], "an alias of an allowed model, and an allowed alias"
    texts = {"messages": [{"role": "user", "content": "a"}]}
    for model, status in (("e00", 200), ("first", 200), ("gpt-4o", 200), ("swarm/route", 404), ("e01", 404)):
        card = client.get(f"/v1/models/{model}", headers=headers)
        bodies = {
            "completions": {**ASKED, "model": model},
            "chat/completions": {"model": model, "max_tokens": 2, **texts},
            "responses": {"model": model, "input": "a", "max_output_tokens": 2},
            "tokenize": {"model": model, "prompt": "a"},
            "detokenize": {"model": model, "tokens": [5]},
        }
        answers = [client.post(f"/v1/{path}", json=body, headers=headers) for path, body in bodies.items()]
        assert {answer.status_code for answer in (card, *answers)} == {status}, model
        if status == 404:
            assert {answer.json()["error"]["code"] for answer in answers} == {"model_not_found"}
            assert all("e02" not in answer.text and "seed" not in answer.text for answer in answers)
    embedding = client.post("/v1/embeddings", json={"model": "e01", "input": "a"}, headers=headers)
    assert embedding.status_code == 404


def test_while_the_accounts_are_away_nobody_gets_in(client: TestClient, store: Store, near: Near) -> None:
    _, headers = make(store)
    near.is_down = True
    refused = client.post("/v1/completions", json=ASKED, headers=headers)
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
    assert client.get("/healthz").status_code == 200


# ---- what is counted


def whole(client: TestClient, path: str, body: dict[str, Any], headers: dict[str, str]) -> int:
    """The usage of an answer."""
    response = client.post(path, json=body, headers=headers)
    assert response.status_code == 200, response.text
    usage = response.json()["usage"]
    return int(usage["total_tokens"])


@pytest.mark.parametrize("limits", [{}, {"quota_tokens": 10_000}, {"tokens_per_minute": 10_000}])
def test_what_a_key_used_is_the_sum_of_its_answers_usage(
    client: TestClient, store: Store, near: Near, limits: dict[str, int]
) -> None:
    key_id, headers = make(store, **limits)
    chat = {"model": "swarm/broadcast", "messages": [{"role": "user", "content": "a b"}], "max_tokens": 4}
    total = whole(client, "/v1/completions", ASKED, headers)
    total += whole(client, "/v1/completions", {**ASKED, "prompt": ["a", "b"], "n": 2, "temperature": 1}, headers)
    total += whole(client, "/v1/chat/completions", chat, headers)
    total += whole(client, "/v1/responses", {"model": "swarm", "input": "a b", "max_output_tokens": 4}, headers)
    total += whole(client, "/v1/embeddings", {"model": "e00", "input": ["a", "b c"]}, headers)
    total += whole(client, "/v1/completions", {**ASKED, "best_of": 3, "temperature": 1}, headers)
    body = {**ASKED, "stream": True, "stream_options": {"include_usage": True}}
    events = client.post("/v1/completions", json=body, headers=headers).text.split("\n\n")
    total += json.loads(events[-3].removeprefix("data: "))["usage"]["total_tokens"]
    counted = client.post("/v1/tokenize", json={"model": "e00", "prompt": "a b c"}, headers=headers).json()
    total += counted["count"]
    client.post("/v1/detokenize", json={"model": "e00", "tokens": counted["tokens"]}, headers=headers)
    assert used(store, key_id) == total + counted["count"]
    assert len(near.open) == (9 if limits else 0), "a reservation for each, where it is needed"


def test_a_stream_is_charged_before_its_last_event(swarm: Swarm, store: Store, near: Near) -> None:
    """Who has the end of an answer has been charged, should the gateway be killed right then."""
    key_id, headers = make(store, quota_tokens=1_000)
    client = client_of(catalog_of(swarm, echoes(swarm)), guard=Guard(near))
    before_end: list[int] = []
    with client.stream("POST", "/v1/completions", json={**ASKED, "stream": True}, headers=headers) as response:
        for line in response.iter_lines():
            if line == "data: [DONE]":
                before_end.append(used(store, key_id))
    assert before_end == [used(store, key_id)] and 0 < before_end[0] < 30
    assert near.told == []


def test_what_is_refused_or_fails_is_given_back(swarm: Swarm, store: Store, near: Near) -> None:
    class Failing(EchoEngine):
        async def _wait(self) -> None:
            raise RuntimeError("broken")

    key_id, headers = make(store, quota_tokens=1_000, tokens_per_minute=1_000)
    client = client_of(catalog_of(swarm, echoes(swarm, Failing, ("e00",))), guard=Guard(near))
    assert client.post("/v1/completions", json=ASKED, headers=headers).status_code >= 500
    assert len(near.open) == 1 and used(store, key_id) == 0
    assert client.post("/v1/completions", json={**ASKED, "prompt": "a " * 500}, headers=headers).status_code == 400
    left = client.post("/v1/completions", json={**ASKED, "model": "e01"}, headers=headers)
    assert left.headers["x-ratelimit-remaining-tokens"] == str(1_000 - 5 - left.json()["usage"]["prompt_tokens"])


def test_a_client_that_leaves_is_charged_for_what_it_had(swarm: Swarm, store: Store, near: Near) -> None:
    key_id, headers = make(store, quota_tokens=1_000)

    engine = EchoEngine(Config(kind="echo", delay_ms=5))
    for name in swarm.members:
        asyncio.run(engine.load(name, str(swarm.checkpoint(name))))
    app: Any = client_of(catalog_of(swarm, dict.fromkeys(swarm.members, engine)), guard=Guard(near)).app
    body = json.dumps({**ASKED, "max_tokens": 60, "stream": True}).encode()
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    scope = {
        **{"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "http_version": "1.1"},
        "headers": [*raw, (b"content-type", b"application/json")],
    }
    num_events = 0

    async def leave_after_three() -> None:
        left, sent = asyncio.Event(), False

        async def receive() -> dict[str, Any]:
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": body, "more_body": False}
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            nonlocal num_events
            num_events += bool(message.get("body"))
            if num_events == 3:
                left.set()

        await app(scope, receive, send)

    asyncio.run(leave_after_three())
    prompt = 1 + len(ulm.load(swarm.checkpoint("e00"))[1].encode("a b c a b c"))
    ((reservation, of, tokens),) = near.told
    assert reservation is not None and of == key_id and tokens == used(store, key_id)
    assert prompt + 3 <= tokens < prompt + 60


@pytest.mark.parametrize("limits", [{}, {"quota_tokens": 1_000}])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/completions?stream", "/v1/embeddings"])
def test_who_leaves_before_the_first_token_pays_the_prompt(
    swarm: Swarm, store: Store, near: Near, log: Path, path: str, limits: dict[str, int]
) -> None:
    class Slow(EchoEngine):
        begun = asyncio.Event()

        async def _wait(self) -> None:
            self.begun.set()
            await asyncio.sleep(60)

    key_id, headers = make(store, **limits)
    slow = Slow(Config(kind="echo"))
    asyncio.run(slow.load("e00", str(swarm.checkpoint("e00"))))
    guard, records = Guard(near, log=RequestLog(log)), Records()
    app: Any = client_of(catalog_of(swarm, {**echoes(swarm), "e00": slow}), records, guard=guard).app
    text: Any = {"input": ASKED["prompt"]} if "embeddings" in path else {**ASKED, "stream": "stream" in path}

    async def leave() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://testserver") as asking:
            waiting = asyncio.create_task(asking.post(path, json={**text, "model": "e00"}, headers=headers))
            await slow.begun.wait()
            assert not waiting.done() and used(store, key_id) == (0 if not limits else near.reserved)
            waiting.cancel()
            await asyncio.wait([waiting])

    asyncio.run(leave())
    prompt = 1 + len(ulm.load(swarm.checkpoint("e00"))[1].encode("a b c a b c"))
    assert used(store, key_id) == prompt == json.loads(log.read_text())["tokens"]
    assert [tags["outcome"] for name, _, tags in records if name == "ulm_requests_total"] == ["cancelled"]


# ---- limits, as clients meet them


def test_every_answer_tells_what_is_left_and_openais_client_understands_the_refusals(
    client: TestClient, store: Store
) -> None:
    _, headers = make(store, requests_per_minute=3, tokens_per_minute=100)
    first = client.post("/v1/completions", json=ASKED, headers=headers)
    usage = first.json()["usage"]
    told = {name: value for name, value in first.headers.items() if name.startswith("x-ratelimit-")}
    assert set(told) == {
        f"x-ratelimit-{a}-{b}" for a in ("limit", "remaining", "reset") for b in ("requests", "tokens")
    }
    assert (told["x-ratelimit-limit-requests"], told["x-ratelimit-remaining-requests"]) == ("3", "2")
    assert told["x-ratelimit-remaining-tokens"] == str(100 - usage["prompt_tokens"] - 5)
    assert float(told["x-ratelimit-reset-tokens"].removesuffix("s")) == pytest.approx(60, abs=5)
    asked: Any = {**ASKED, "prompt": "a", "max_tokens": 90}
    api = openai.OpenAI(
        base_url="http://testserver/v1", api_key=headers["Authorization"].split()[1], http_client=client, max_retries=0
    )
    with pytest.raises(openai.RateLimitError) as tokens:
        api.completions.create(**asked)
    assert (tokens.value.type, tokens.value.code) == ("tokens", "rate_limit_exceeded")
    assert 50 <= int(tokens.value.response.headers["retry-after"]) <= 60
    api.models.list()
    with pytest.raises(openai.RateLimitError) as requests:
        api.models.list()
    assert (requests.value.type, requests.value.code) == ("requests", "rate_limit_exceeded")
    assert requests.value.response.headers["x-ratelimit-remaining-requests"] == "0"


def test_a_quota_is_never_exceeded_and_says_so(client: TestClient, store: Store) -> None:
    key_id, headers = make(store, quota_tokens=60)
    statuses = [client.post("/v1/completions", json=ASKED, headers=headers).status_code for _ in range(10)]
    assert statuses == sorted(statuses) and {200, 429} == set(statuses)
    refused = client.post("/v1/completions", json=ASKED, headers=headers)
    assert refused.json()["error"]["code"] == refused.json()["error"]["type"] == "insufficient_quota"
    assert refused.headers["x-should-retry"] == "false" and used(store, key_id) <= 60
    assert client.get("/v1/models", headers=headers).status_code == 200, "what takes no tokens goes on"


def test_a_reservation_knows_choices_members_and_budgets(client: TestClient, store: Store, near: Near) -> None:
    _, headers = make(store, quota_tokens=10_000)
    reserved: list[int] = []
    take = near.reserve

    async def noted(key_id: str, tokens: int) -> tuple[str, dict[str, str]]:
        reserved.append(tokens)
        return await take(key_id, tokens)

    near.reserve = noted  # type: ignore[method-assign]
    for more in (
        {},
        {"n": 3, "temperature": 1},
        {"model": "swarm/broadcast"},
        {"n": 3, "temperature": 1, "ulm": {"budget": {"max_tokens": 7}}},
        {"n": 1, "best_of": 4, "temperature": 1},
    ):
        answer = client.post("/v1/completions", json={**ASKED, **more}, headers=headers)
        usage = answer.json()["usage"]
        assert usage["total_tokens"] <= reserved[-1]
        reserved[-1] -= usage["prompt_tokens"]
    assert reserved == [5, 15, 20, 7, 20]


# ---- the rest around it


def test_without_keys_nothing_is_asked_and_a_foreign_name_is_refused(swarm: Swarm) -> None:
    client = client_of(catalog_of(swarm, echoes(swarm)), guard=Guard(is_local=True))
    for host in ("127.0.0.1:8000", "localhost", "localhost:1", "[::1]:8000", "127.0.0.2"):
        assert client.get("/v1/models", headers={"Host": host}).status_code == 200, host
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "10.0.0.1", "", "[", "[::1", "a@b@"):
        refused = client.get("/v1/models", headers={"Host": host})
        assert refused.status_code == 403 and "requests for this machine only" in refused.json()["error"]["message"], (
            host
        )
    open_to_all = client_of(catalog_of(swarm, echoes(swarm)))
    assert open_to_all.get("/v1/models", headers={"Host": "evil.example"}).status_code == 200


def test_a_log_that_nobody_reads_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="pipe cannot be written: No such device"):
        RequestLog(tmp_path / "pipe")


def test_a_page_of_a_listed_origin_may_ask_and_read_refusals(client: TestClient, store: Store) -> None:
    wish = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    asked = {**wish, "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang"}
    preflight = client.options("/v1/completions", headers=asked)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "https://a.example"
    refused = client.get("/v1/models", headers={"Origin": "https://a.example"})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://a.example")
    _, headers = make(store)
    for origin, allowed in (("https://a.example", "https://a.example"), ("https://b.example", None)):
        answer = client.get("/v1/models", headers={**headers, "Origin": origin})
        assert answer.headers.get("access-control-allow-origin") == allowed
    exposed = answer.headers.get("access-control-expose-headers", "")
    assert {"x-request-id", "retry-after", "x-ratelimit-remaining-tokens"} <= set(exposed.split(", "))
    assert client.options("/v1/completions", headers={**asked, "Origin": "https://b.example"}).status_code == 400


def test_the_log_has_a_line_a_request_and_no_word_of_it(client: TestClient, store: Store, log: Path) -> None:
    key_id, headers = make(store)
    answer = client.post(
        "/v1/completions", json={**ASKED, "prompt": "geheim"}, headers={**headers, "x-request-id": "mine\n1" * 100}
    )
    client.get("/v1/models/geheim?key=geheim", headers=headers)
    client.get("/geheim")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(line["status"], line["key"], line["model"], line["path"]) for line in lines] == [
        (200, key_id, "e00", "/v1/completions"),
        (404, key_id, None, "/v1/models/{name:path}"),
        (401, None, None, None),
    ]
    assert lines[0]["tokens"] == answer.json()["usage"]["total_tokens"] and lines[0]["ms"] > 0
    assert len(lines[0]["request"]) == 200
    assert "geheim" not in log.read_text() and headers["Authorization"][-32:] not in log.read_text()
    assert oct(log.stat().st_mode & 0o777) == "0o600"


def test_the_log_tells_whose_request_was_refused_and_where(client: TestClient, store: Store, log: Path) -> None:
    def logged(status: int, path: str, headers: dict[str, str], **more: Any) -> tuple[str | None, str | None]:
        assert client.request(more.pop("method", "GET"), path, headers=headers, **more).status_code == status
        line = json.loads(log.read_text().splitlines()[-1])
        assert line["status"] == status
        return line["key"], line["path"]

    key_id, headers = make(store, requests_per_minute=2, quota_tokens=3)
    post = {"method": "POST", "json": ASKED}
    assert logged(403, "/metrics", headers) == (key_id, "/metrics"), (
        "the scope is looked at before requests are counted"
    )
    assert logged(403, "/geheim", headers) == (key_id, None)
    assert logged(429, "/v1/completions", headers, **post) == (key_id, "/v1/completions"), "the quota"
    assert logged(400, "/v1/completions", headers, method="POST", content=b"{") == (key_id, "/v1/completions")
    assert logged(429, "/v1/models/geheim", headers) == (key_id, "/v1/models/{name:path}"), "requests of a minute"
    ended, of_ended = make(store)
    accounts.revoke(store, ended)
    wrong = {"Authorization": headers["Authorization"][:-4] + "0000"}
    for of in ({}, of_ended, wrong):
        assert logged(401, "/v1/completions", of, **post) == (None, "/v1/completions"), (
            "who it claims to be is not told"
        )
    assert logged(401, "/v1/chat/completions", {}) == (None, "/v1/chat/completions"), "by another method, too"
    assert "geheim" not in log.read_text()


def test_answers_say_how_long_they_took(client: TestClient, store: Store) -> None:
    _, headers = make(store)
    for response in (client.get("/v1/models", headers=headers), client.get("/v1/models"), client.get("/healthz")):
        assert 0 <= int(response.headers["openai-processing-ms"]) < 5_000


def test_a_secret_is_in_no_answer_metric_or_log(
    client: TestClient, store: Store, log: Path, records: Records, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    _, headers = make(store, quota_tokens=50, requests_per_minute=5)
    secret = headers["Authorization"].rpartition("-")[2]
    said = []
    for path, body in [
        ("/v1/completions", ASKED),
        ("/v1/completions", {**ASKED, "stream": True}),
        ("/v1/completions", {**ASKED, "max_tokens": 90}),
        ("/v1/completions", {**ASKED, "model": "nope"}),
        ("/v1/completions", {**ASKED, "n": "x"}),
        ("/metrics", {}),
        ("/v1/completions", ASKED),
    ]:
        response = client.post(path, json=body, headers=headers)
        said.append(response.text + str(response.headers))
    assert "429" in log.read_text() and "403" in log.read_text()
    everything = [*said, str(records), caplog.text, log.read_text()]
    everything += [file.read_bytes().decode("latin-1") for file in tmp_path.rglob("*") if file.is_file()]
    assert not any(secret in text for text in everything)
    refused = {tags["why"] for name, _, tags in records if name == "ulm_requests_refused_total"}
    assert refused == {"key", "rate_limit", "quota", "model", "invalid"}


# ---- what is counted for operators


def test_embeddings_and_tokenizing_are_counted_by_model_and_outcome(
    client: TestClient, store: Store, records: Records
) -> None:
    _, headers = make(store, quota_tokens=40)
    embedding = client.post("/v1/embeddings", json={"model": "first", "input": ["a", "b c"]}, headers=headers).json()
    client.post("/v1/embeddings", json={"model": "swarm/route", "input": "a"}, headers=headers)
    client.post("/v1/embeddings", json={"model": "e01", "input": "a", "dimensions": 3}, headers=headers)
    client.post("/v1/embeddings", json={"model": "e01", "input": "a " * 40}, headers=headers)
    client.post("/v1/tokenize", json={"model": "e01", "prompt": "a"}, headers=headers)
    client.post("/detokenize", json={"model": "e01", "tokens": [5]}, headers=headers)
    client.post("/detokenize", json={"model": "e01", "tokens": [10**9]}, headers=headers)
    found = [tuple(tags.values()) for name, _, tags in records if name == "ulm_requests_total"]
    assert found == [
        ("e00", "embeddings", "ok"),
        ("swarm/route", "embeddings", "refused"),
        ("e01", "embeddings", "refused"),
        ("e01", "embeddings", "refused"),
        ("e01", "tokenize", "ok"),
        ("e01", "detokenize", "ok"),
        ("e01", "detokenize", "refused"),
    ]
    assert all(set(tags) == set(METRICS[name].tags) for name, _, tags in records)
    tokens = [(value, dict(tags)) for name, value, tags in records if name == "ulm_tokens_total"]
    assert tokens == [(embedding["usage"]["prompt_tokens"], {"model": "e00", "kind": "prompt"})]
    assert sum(name == "ulm_request_seconds" for name, _, _ in records) == len(found)


def test_what_is_refused_is_counted_by_why(swarm: Swarm, records: Records) -> None:
    class Slow(EchoEngine):
        async def embed(self, member: str, tokens: Any) -> Any:
            raise MemberDownError("gone")

    client = client_of(catalog_of(swarm, echoes(swarm, Slow, ("e00",))), records)
    for why, status, body in (
        ("invalid", 400, {"json": {**ASKED, "n": "x"}}),
        ("invalid", 400, {"content": b"{not json"}),
        ("invalid", 400, {"json": {**ASKED, "prompt": "a " * 500}}),
        ("model", 404, {"json": {**ASKED, "model": "geheim"}}),
        ("too_large", 413, {"content": b" " * (MAX_BODY_BYTES + 1)}),
    ):
        records.clear()
        assert client.post("/v1/completions", **body).status_code == status
        refused = [dict(tags) for name, _, tags in records if name == "ulm_requests_refused_total"]
        assert refused == [{"why": why}]
    records.clear()
    assert client.get("/geheim").status_code == 404
    assert client.get("/v1/completions").status_code == 405
    assert client.post("/v1/embeddings", json={"model": "swarm", "input": "a"}).status_code == 400
    assert client.post("/v1/embeddings", json={"model": "e00", "input": "a"}).status_code == 503
    whys = [tags["why"] for name, _, tags in records if name == "ulm_requests_refused_total"]
    assert whys == ["path", "path", "invalid", "members_down"]


def test_a_body_that_does_not_come_is_counted_as_too_slow(
    swarm: Swarm, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusals, "BODY_S", 0.1)
    app: Any = client_of(catalog_of(swarm, echoes(swarm)), records).app

    async def body() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(60)

    async def ask() -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://testserver") as asking:
            return (await asking.post("/v1/completions", content=body())).status_code

    assert asyncio.run(ask()) == 408
    assert [tags["why"] for name, _, tags in records if name == "ulm_requests_refused_total"] == ["too_slow"]
