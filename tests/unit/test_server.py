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
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route

from serve import connections, door
from serve import server as server_module
from serve.server import Server
from tests.certificates import certificate
from tests.load import session
from ulm.errors import ClusterError

LARGE = 16 << 20  # bytes, more than sockets hold


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

        async def large(request: Request) -> PlainTextResponse:
            self.begun += 1
            return PlainTextResponse("a" * LARGE)

        routes = [Route("/", read, methods=["GET", "POST"]), Route("/stream", stream), Route("/large", large)]
        app = Starlette(routes=routes)
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

            async def ask() -> None:
                async with client.request("POST" if path == "/" else "GET", f"{served.url}{path}?s=5") as answer:
                    await answer.read()

            task = asyncio.create_task(ask())
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


async def exchanged(served: Served, *pieces: bytes, leaves: bool = False) -> bytes:
    """What a connection says to this, until it ends."""
    reader, writer = await asyncio.open_connection(*served.address)
    said = b""
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.05)
        while not leaves and (more := await reader.read(1 << 16)):
            said += more
    except ConnectionError:
        pass
    finally:
        writer.close()
    return said


HEAD = b"POST %s HTTP/1.1\r\nHost: a\r\n"


def test_a_client_that_leaves_behind_a_second_request_ends_its_first(served: Served) -> None:
    whole = HEAD % b"/?s=5" + b"Content-Length: 2\r\n\r\n{}"

    async def body() -> None:
        made = await served.server()
        for pieces in ((whole + whole,), (whole, whole), (whole, b"POST")):
            await exchanged(served, *pieces, leaves=True)
        await wait_until(lambda: served.cancelled == 3)
        answer = await exchanged(served, (HEAD % b"/?s=0.1" + b"Content-Length: 2\r\n\r\n{}") * 2)
        assert answer.count(b"200 OK") == 1 and b"connection: close" in answer, "the second is to be asked again"
        await made.drain(is_last=True, drain_s=1)

    asyncio.run(body())


def test_what_follows_an_answer_and_is_no_request_ends(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEADERS_S", 0.3)
    refused = HEAD % b"/nothing"
    chunked = refused + b"Transfer-Encoding: chunked\r\n\r\n0\r\n"

    async def body() -> None:
        made = await served.server()
        async with asyncio.timeout(5):
            for pieces in (
                (chunked, *[b"a: b\r\n" * 10_000] * 50),
                (chunked + b"a: ", *[b"b" * 60_000] * 50),
                (refused + b"Content-Length: 999999999\r\n\r\n", b"x"),
                (refused + b"Content-Length: 0\r\n\r\n", b"\r\n"),
            ):
                await exchanged(served, *pieces)
        await made.drain(is_last=True, drain_s=1)

    asyncio.run(body())


def test_who_does_not_read_is_left_and_who_reads_slowly_is_not(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "READ_S", 0.3)

    async def read(seconds: float) -> int:
        """Bytes of a large answer that come to one who waits so long before each piece."""
        reader, writer = await asyncio.open_connection(*served.address, limit=1 << 16)
        writer.write(b"GET /large HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        num_read = 0
        try:
            while True:
                await asyncio.sleep(seconds)
                if not (more := await reader.read(1 << 20)):
                    return num_read
                num_read += len(more)
                if seconds >= 1 or num_read > LARGE // 2:
                    seconds = 0  # what is there by then
        except ConnectionError:
            return num_read
        finally:
            writer.close()

    async def body() -> None:
        made = await served.server()
        never, slowly = await asyncio.gather(read(1.5), read(0.002))
        assert slowly > LARGE > never
        await made.drain(is_last=True, drain_s=1)

    asyncio.run(body())


def test_the_port_is_taken_at_once_and_given_to_gateways(served: Served) -> None:
    host, port = served.address
    served.port.close()
    held = door.Door(host, port)
    try:
        for taken in (lambda: door.Door(host, port), lambda: door.check_port(host, port)):
            with pytest.raises(ClusterError, match=f"port {port} of {host} cannot be used.*--set port={port + 1}"):
                taken()
        with door._received(held.place()) as given:
            assert given.getsockname() == (host, port)
        assert Path(held.place()).parent.stat().st_mode & 0o077 == 0
        with socket.create_connection((host, port)):  # waits for a gateway
            pass
    finally:
        held.close()
    door.check_port(host, port)
