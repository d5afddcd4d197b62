"""What is bounded and who says so, without Ray: the gateway, the proxy, an engine's health, a recipe."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route
from typer.testing import CliRunner

from serve import connections
from serve.api import openai, refusals
from serve.api.refusals import BoundedOpen
from serve.engines.echo import EchoEngine
from serve.engines.local.engine import LocalEngine
from serve.member import EngineHost
from serve.plan import make_plan
from serve.proxy import middlewares
from tests.small_members import small_member
from ulm.cli import cluster
from ulm.cli.main import app as cli
from ulm.errors import ClusterError, ConfigError, UlmError, UnavailableError
from ulm.recipes import ServeRecipe
from ulm.recipes.base import validate

URL = "http://endpoint"


def client(app: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url=URL)


# ---- the gateway


def test_a_gateway_works_on_so_many_at_once_and_refuses_the_others_unread() -> None:
    counted: list[Any] = []

    async def body() -> None:
        may_end = asyncio.Event()

        async def slow(request: Any) -> JSONResponse:
            await may_end.wait()
            return JSONResponse({})

        async def unread() -> Any:
            raise AssertionError("the body of a refused request was read")
            yield b""

        app = Starlette(routes=[Route("/v1/x", slow, methods=["POST"]), Route("/healthz", lambda _: JSONResponse({}))])
        app.add_middleware(BoundedOpen, max_open=2, record=lambda *count: counted.append(count))
        async with client(app) as asking:
            open_ = [asyncio.create_task(asking.post("/v1/x")) for _ in range(2)]
            await asyncio.sleep(0.01)
            refused = await asking.post("/v1/x", content=unread())
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            assert refused.json()["error"]["code"] == "overloaded"
            assert (await asking.get("/healthz")).status_code == 200
            may_end.set()
            assert [(await answer).status_code for answer in open_] == [200, 200]
            assert (await asking.post("/v1/x")).status_code == 200, "places are given back"

    asyncio.run(body())
    assert counted == [("ulm_requests_refused_total", 1, {"why": "gateway_full"})]


def test_a_body_that_does_not_come_is_refused_and_gives_its_place_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "BODY_S", 0.05)
    app = FastAPI()
    app.add_middleware(refusals.BoundedBody)
    app.add_middleware(BoundedOpen, max_open=1, record=lambda *_: None)
    refusals.handle_errors(app, lambda *_: None)

    @app.post("/v1/x")
    async def whole(body: dict[str, Any]) -> dict[str, Any]:
        await asyncio.sleep(0.1)  # longer than a body may take: an answer may
        return body

    async def slowly() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(0.5)

    async def body() -> None:
        kind = {"content-type": "application/json"}
        async with client(app) as asking:
            for content, status in ((slowly(), 408), (b"{}", 200), (slowly(), 408), (b"{}", 200)):
                answer = await asking.post("/v1/x", content=content, headers=kind)
                assert answer.status_code == status, answer.text
                if status == 408:
                    assert answer.json()["error"]["type"] == "invalid_request_error"

    asyncio.run(body())


def test_many_who_ask_whether_it_is_ready_cost_what_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai, "SHARED_S", 0.1)
    looks = 0

    async def look() -> int:
        nonlocal looks
        looks += 1
        await asyncio.sleep(0.02)
        if looks == 2:
            raise UnavailableError("nobody is there")
        return looks

    async def body() -> None:
        seen = openai.shared(look)
        leaves = asyncio.ensure_future(seen())
        others = [asyncio.ensure_future(seen()) for _ in range(50)]
        await asyncio.sleep(0.01)
        leaves.cancel()
        assert await asyncio.gather(*others, seen()) == [1] * 51
        assert (await seen(), looks) == (1, 1)
        await asyncio.sleep(openai.SHARED_S)
        failed = await asyncio.gather(*(seen() for _ in range(5)), return_exceptions=True)
        assert [type(error) for error in failed] == [UnavailableError] * 5 and looks == 2
        await asyncio.sleep(openai.SHARED_S)
        assert await seen() == 3

    asyncio.run(body())


# ---- the proxy


async def through_the_proxy(answer: Any, path: str = "/v1/models") -> httpx.Response:
    """What a client gets of what the proxy's application does."""
    (middleware,) = middlewares()
    async with client(middleware.cls(answer, *middleware.args, **middleware.kwargs)) as asking:
        return await asking.get(path)


@pytest.mark.parametrize(
    ("status", "message"),
    [(404, "The endpoint is starting or ending"), (503, "Too many requests wait"), (500, "the gateway that worked on")],
)
def test_the_proxys_own_errors_are_openais_with_the_requests_id(status: int, message: str) -> None:
    own = PlainTextResponse("Path '/v1/models' not found", status, {"x-request-id": "r-1"})
    answer = asyncio.run(through_the_proxy(own))
    error = answer.json()["error"]
    assert (answer.status_code, answer.headers["retry-after"], answer.headers["x-request-id"]) == (503, "1", "r-1")
    assert error["type"] == "server_error" and message in error["message"] and "not found" not in error["message"]


def test_answers_of_the_gateway_and_the_proxys_own_pages_are_left_alone() -> None:
    for path, own in (
        ("/v1/models", JSONResponse({"error": {"code": "model_not_found"}}, 404)),
        ("/metrics", PlainTextResponse("ray_ulm_requests_total 1")),
        ("/-/healthz", PlainTextResponse("draining", 503)),
    ):
        answer = asyncio.run(through_the_proxy(own, path))
        assert (answer.status_code, answer.content) == (own.status_code, own.body)


def test_a_gateway_that_dies_leaves_an_error_and_not_a_silence() -> None:
    async def nothing(scope: Any, receive: Any, send: Any) -> None:
        pass

    async def begun(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})

    refused = asyncio.run(through_the_proxy(nothing))
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
    assert refused.headers["x-request-id"]
    first, last, rest = asyncio.run(through_the_proxy(begun)).text.split("\n\n")
    assert (first, rest) == ("data: {}", "") and json.loads(last.removeprefix("data: "))["error"][
        "code"
    ] == "unavailable"


def test_a_stream_that_ends_well_has_nothing_behind_it() -> None:
    answer = asyncio.run(
        through_the_proxy(StreamingResponse(iter(["data: [DONE]\n\n"]), media_type="text/event-stream"))
    )
    assert answer.text == "data: [DONE]\n\n"


def test_headers_that_serve_takes_orders_from_do_not_reach_it() -> None:
    async def told(request: Request) -> JSONResponse:
        return JSONResponse(dict(request.headers))

    orders = [
        "x-request-timeout-seconds",
        "x-request-disconnect-disabled",
        "x-session-id",
        "serve_multiplexed_model_id",
    ]
    sent = {**dict.fromkeys(orders, "1"), "serve-multiplexed-model-id": "a", "authorization": "mine"}

    async def body(request_id: bytes) -> dict[str, str]:
        (middleware,) = middlewares()
        app: Any = Starlette(routes=[Route("/", told)])
        async with client(middleware.cls(app, *middleware.args, **middleware.kwargs)) as asking:
            raw = [(name.encode(), value.encode()) for name, value in sent.items()]
            answer = await asking.get("/", headers=[*raw, (b"x-request-id", request_id)])
            return dict(answer.json())

    for request_id, passes in ((b"r 1", True), (b"\xff", False), (b"a" * 513, False), (b"", False)):
        headers = asyncio.run(body(request_id))
        assert set(headers) & {*sent, "x-request-id"} == {"authorization", *(["x-request-id"] if passes else [])}


def test_the_proxy_has_no_paths_without_a_beginning() -> None:
    async def never(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("it reached Serve")

    async def body() -> list[Any]:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        (middleware,) = middlewares()
        app: Any = middleware.cls(never, *middleware.args, **middleware.kwargs)
        await app({"type": "http", "method": "OPTIONS", "path": "*", "headers": []}, None, send)
        return sent

    begun, _ = asyncio.run(body())
    assert begun["status"] == 400


def test_a_client_has_so_long_for_its_headers_and_so_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEADERS_S", 0.2)
    connections.bound()

    async def slow(request: Request) -> PlainTextResponse:
        await asyncio.sleep(0.5)
        return PlainTextResponse("whole")

    async def said(port: int, *pieces: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.03)
            return await reader.read()
        except ConnectionError:
            return b"reset"
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    async def body() -> None:
        server = uvicorn.Server(uvicorn.Config(Starlette(routes=[Route("/", slow)]), port=0, log_config=None))
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        begun, end = b"GET / HTTP/1.1\r\nHost: a\r\n", b"Connection: close\r\n\r\n"
        found = await asyncio.gather(
            said(port),
            said(port, begun),
            said(port, begun, *[b"a: b\r\n"] * 20, end),
            said(port, begun, b"a: ", *[b"b" * 40_000] * 10),
            said(port, begun, end),
            said(port, begun + b"\r\n", begun),  # the second is begun while the first is answered
            said(port, begun, b"Upgrade: websocket\r\nConnection: Upgrade\r\n" + b"a: " + b"b" * 9_000 + b"\r\n\r\n"),
        )
        server.should_exit = True
        await serving
        assert {*found[:3]} <= {b"", b"reset"}
        assert found[3] == b"reset" or b"larger than 65536 bytes" in found[3]
        assert [answer.count(b"whole") for answer in found] == [0, 0, 0, 0, 1, 1, 1]

    asyncio.run(body())


# ---- an engine's health


@pytest.mark.parametrize("kind", ["echo", "local"])
def test_an_engine_that_has_ended_is_unhealthy_and_its_members_are_gone(kind: str, tmp_path: Path) -> None:
    async def body() -> None:
        host = EngineHost({"kind": kind}, {"a": str(small_member(tmp_path))}, "engine")
        await host.check()
        await host.check()
        assert isinstance(host.engine, EchoEngine | LocalEngine) and set(await host.engine.members()) == {"a"}
        await host.engine.close()
        for asked in (host.check(), host.engine.members(), host.engine.stats()):
            with pytest.raises(UlmError, match="the engine was closed"):
                await asked

    asyncio.run(body())


# ---- the recipe


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"gateways": 2}, "gateways: 2 of them cannot share the engine inside the gateway (members_per_engine: 8, say"),
        ({"replicas": 2}, "replicas: has no effect: the engine is inside the gateway (members_per_engine: 8, say"),
        ({"replicas": 2, "members_per_engine": 1}, None),
        ({"gateways": 2, "members_per_engine": 1}, None),
    ],
)
def test_replicas_are_of_what_has_a_process_of_its_own(
    fields: dict[str, Any], problem: str | None, tmp_path: Path
) -> None:
    members = {"a": {"checkpoint": str(small_member(tmp_path))}}
    recipe = validate(ServeRecipe, {"name": "t", "members": members, **fields})
    if problem is None:
        make_plan(recipe, root=tmp_path, near=None)
        return
    with pytest.raises(ConfigError) as error:
        make_plan(recipe, root=tmp_path, near=None)
    assert str(error.value).startswith(problem)


def test_an_update_needs_an_endpoint_at_the_same_address_and_is_one_at_a_time(root: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "serve.yaml"
    recipe.write_text(f"members: {{a: {{checkpoint: {small_member(tmp_path)}}}}}\nport: 8123\n")
    asked = ["serve", "update", str(recipe)]
    missing = CliRunner().invoke(cli, asked)
    assert isinstance(missing.exception, ClusterError) and "no endpoint of this root is running" in str(
        missing.exception
    )
    state = {"url": "http://127.0.0.1:8000/v1", "pid": os.getpid(), "ray_address": "127.0.0.1:1"}
    cluster.remember(root, {**state, "host": "127.0.0.1"})
    elsewhere = CliRunner().invoke(cli, asked)
    assert isinstance(elsewhere.exception, ConfigError)
    assert str(elsewhere.exception).startswith(
        "host, port: the recipe's http://127.0.0.1:8123/v1 is not http://127.0.0.1:8000"
    )
    with cluster.updating(root):
        second = CliRunner().invoke(cli, [*asked, "--set", "port=8000"])
    assert isinstance(second.exception, ClusterError) and "another `ulm serve update`" in str(second.exception)
    cluster.remember(root, {**state, "host": "0.0.0.0"})
    without_keys = CliRunner().invoke(cli, [*asked, "--set", "port=8000"])
    assert isinstance(without_keys.exception, ConfigError), "whose recipe is for this machine only"
    assert str(without_keys.exception).startswith("host: the endpoint listens at 0.0.0.0, and not at 127.0.0.1")
