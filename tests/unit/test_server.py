"""The gateway's HTTP server, without Ray: one port for several, ends that lose nothing, clients that leave."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from serve import server as server_module
from serve.server import Server
from tests.load import session
from tests.serving.test_keyed_endpoint import certificate


class Served:
    """Servers of one port, as gateways of one node have it."""

    def __init__(self) -> None:
        self.port = socket.socket()
        self.port.bind(("127.0.0.1", 0))
        self.address: tuple[str, int] = self.port.getsockname()
        self.url = f"http://127.0.0.1:{self.address[1]}"
        self.begun, self.ended, self.cancelled = 0, 0, 0

    async def server(self, name: str = "a", tls: tuple[Path, Path] | None = None) -> Server:
        async def whole(request: Request) -> JSONResponse:
            await self._work(float(request.query_params.get("s", 0)))
            said = {"by": name, "ids": request.headers.getlist("x-request-id"), "body": (await request.body()).decode()}
            return JSONResponse(said)

        async def stream(request: Request) -> StreamingResponse:
            async def events() -> AsyncIterator[str]:
                yield "begun "
                await self._work(float(request.query_params.get("s", 0)))
                yield "ended"

            return StreamingResponse(events())

        async def read(request: Request) -> JSONResponse:
            """As FastAPI does it: the body first."""
            await request.body()
            return await whole(request)

        app = Starlette(routes=[Route("/", read, methods=["GET", "POST"]), Route("/stream", stream)])
        made = Server(app, self.port.dup(), tls)
        await made.begun()
        return made

    async def _work(self, seconds: float) -> None:
        self.begun += 1
        try:
            await asyncio.sleep(seconds)
            self.ended += 1
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


@pytest.fixture
def served() -> Iterator[Served]:
    it = Served()
    yield it
    it.port.close()


@asynccontextmanager
async def asking() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(trust_env=False, timeout=10) as client:
        yield client


async def wait_until(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("path", ["/", "/stream"])
def test_a_client_that_leaves_ends_its_request(served: Served, path: str) -> None:
    async def body() -> None:
        made = await served.server()
        async with session() as client:
            task = asyncio.create_task(client.request("POST" if path == "/" else "GET", f"{served.url}{path}?s=5"))
            await wait_until(lambda: served.begun == 1)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await wait_until(lambda: served.cancelled == 1)
        async with asking() as client:
            for _ in range(3):
                assert (await client.post(served.url, content=b"abc")).json()["body"] == "abc"
        await made.drain(is_last=True, drain_s=1)
        assert (served.ended, served.cancelled) == (3, 1), "answers that end are not cancelled"

    asyncio.run(body())


def test_every_answer_has_one_request_id_and_a_clients_own_where_it_is_one(served: Served) -> None:
    async def body() -> None:
        made = await served.server()
        async with asking() as client:
            found = []
            for given in ([], [b"mine 1"], [b"\xff"], [b"a" * 513], [b""], [b"one", b"two"]):
                answer = await client.get(served.url, headers=[(b"x-request-id", one) for one in given])
                (one,) = answer.headers.get_list("x-request-id")
                assert answer.json()["ids"] == [one], "which the application is told, too"
                found.append(one)
            missing = await client.get(served.url + "/nothing")
            assert missing.status_code == 404 and len(missing.headers.get_list("x-request-id")) == 1
        assert found[1] == "mine 1" and len({*found}) == len(found)
        assert not {*found} & {"", "one", "two", "a" * 513}
        await made.drain(is_last=True, drain_s=1)

    asyncio.run(body())


def test_a_path_without_a_beginning_is_refused(served: Served) -> None:
    async def body() -> None:
        made = await served.server()
        reader, writer = await asyncio.open_connection(*served.address)
        writer.write(b"OPTIONS * HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        assert b"400 Bad Request" in await reader.read()
        writer.close()
        await made.drain(is_last=True, drain_s=1)

    asyncio.run(body())


def test_one_server_follows_another_and_nobody_notices(served: Served) -> None:
    """Clients with connections that they keep, and clients with new ones, while servers come and go."""

    async def body() -> None:
        made = await served.server("0")
        stopped, answers, problems = asyncio.Event(), list[str](), list[str]()

        async def client(keeps: bool) -> None:
            async with session() as asked:
                while not stopped.is_set():
                    headers = {} if keeps else {"Connection": "close"}
                    try:
                        async with asked.post(f"{served.url}/?s=0.01", data=b"abc", headers=headers) as answer:
                            answers.append((await answer.json())["by"])
                    except Exception as error:  # noqa: BLE001  whatever it is, a client has seen it
                        problems.append(repr(error))

        tasks = [asyncio.create_task(client(n % 2 == 0)) for n in range(8)]
        for number in range(1, 4):
            following = await served.server(str(number))
            await made.drain(is_last=False, drain_s=10)
            made = following
            await asyncio.sleep(0.2)
        stopped.set()
        await asyncio.gather(*tasks)
        await made.drain(is_last=True, drain_s=1)
        assert problems == []
        assert {*answers} == {"0", "1", "2", "3"} and answers[-1] == "3"

    asyncio.run(body())


def test_the_last_one_answers_what_is_under_way_and_refuses_what_is_new(served: Served) -> None:
    async def body() -> None:
        made = await served.server()
        served.port.close()
        async with asking() as client:
            under_way = [asyncio.create_task(client.get(f"{served.url}{path}?s=0.5")) for path in ("/", "/stream")]
            await wait_until(lambda: served.begun == 2)
            drained = asyncio.create_task(made.drain(is_last=True, drain_s=10))
            await asyncio.sleep(0.05)
            refused = await client.get(served.url)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
            assert int(refused.headers["retry-after"]) >= 1 and refused.headers["connection"] == "close"
            whole, stream = [await answer for answer in under_way]
            assert whole.json()["by"] == "a" and stream.text == "begun ended"
            await drained
            with pytest.raises(httpx.ConnectError):
                await client.get(served.url)

    asyncio.run(body())


def test_what_does_not_end_has_the_time_that_was_given(served: Served) -> None:
    async def body() -> None:
        made = await served.server()
        async with asking() as client:
            task = asyncio.create_task(client.get(f"{served.url}?s=60"))
            await wait_until(lambda: served.begun == 1)
            async with asyncio.timeout(5):
                await made.drain(is_last=True, drain_s=0.2)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(body())


def test_connections_wait_while_nobody_accepts_and_are_answered_then(served: Served) -> None:
    """A gateway that dies leaves the port to its successor."""

    async def body() -> None:
        first = await served.server()
        await first.drain(is_last=False, drain_s=0)
        async with asking() as client:
            waiting = [asyncio.create_task(client.get(served.url)) for _ in range(5)]
            await asyncio.sleep(0.2)
            assert not any(task.done() for task in waiting)
            made = await served.server("b")
            assert {(await answer).json()["by"] for answer in waiting} == {"b"}
        await made.drain(is_last=True, drain_s=1)

    asyncio.run(body())


def test_a_certificate_that_is_renewed_is_used_without_an_end(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "CERTIFICATE_EVERY_S", 0.05)
    folders = [tmp_path / name for name in ("used", "next")]
    for folder in folders:
        folder.mkdir()
    used, following = ([Path(certificate(folder)[name]) for name in ("certificate", "key")] for folder in folders)

    async def shown(address: tuple[str, int]) -> str:
        return await asyncio.to_thread(ssl.get_server_certificate, address)

    async def body() -> None:
        made = await served.server(tls=(used[0], used[1]))
        assert await shown(served.address) == (was := used[0].read_text())
        used[0].write_text("half")  # a key and a certificate are two files, and neither is written at once
        await asyncio.sleep(0.2)
        made.check()
        assert await shown(served.address) == was
        for place, other in zip(used, following, strict=True):
            place.write_bytes(other.read_bytes())
        async with asyncio.timeout(5):
            while await shown(served.address) != following[0].read_text():
                await asyncio.sleep(0.05)
        await made.drain(is_last=True, drain_s=1)

    asyncio.run(body())
