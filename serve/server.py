"""The gateway's own HTTP server. Ray Serve's proxy would take 8 ms of a request, and seven times the processor's."""

from __future__ import annotations

import asyncio
import socket
import ssl
import uuid
from collections.abc import Awaitable
from contextlib import suppress
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api.refusals import refusal
from serve.connections import REQUEST_ID, BoundedConnection
from ulm.errors import RequestError, UnavailableError

KEEP_ALIVE_S = 90.0  # that a connection may be idle
LINGER_S = 1.5  # that idle connections of a gateway which ends stay: who asks on one is told that it was the last time
BACKLOG = 2_048  # connections that wait to be accepted
LOOK_EVERY_S = 0.05
CERTIFICATE_EVERY_S = 30.0
NO_PASSWORD = ""  # OpenSSL would ask for one at the terminal, and all would wait
CLOSE = (b"connection", b"close")


class Server:
    """Serves an ASGI application at a socket that others may accept from, too. Made on the loop that it runs on."""

    def __init__(self, app: ASGIApp, port: socket.socket, tls: tuple[Path, Path] | None = None) -> None:
        self._edge, self._tls = Edge(app), tls
        files = {"ssl_certfile": tls[0], "ssl_keyfile": tls[1]} if tls else {}
        self._config = uvicorn.Config(
            self._edge,
            http=BoundedConnection,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",  # a warning for each client that does not speak HTTP would be anybody's to have written
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=int(KEEP_ALIVE_S),
            backlog=BACKLOG,
            **files,  # type: ignore[arg-type]
        )
        self._server = uvicorn.Server(self._config)
        self._serving = asyncio.create_task(self._server.serve(sockets=[port]))
        self._renewing = asyncio.create_task(self._renew_certificate())

    async def begun(self) -> None:
        """Returns once it accepts connections."""
        while not self._server.started:
            self.check()
            await asyncio.sleep(0.01)

    def check(self) -> None:
        """Raises what ended it, once it has ended."""
        if self._serving.done():
            self._serving.result()
            raise RuntimeError("the server has ended")

    async def drain(self, is_last: bool, drain_s: float) -> None:
        """Take nothing new, and return once all is answered, or so much time has passed.

        What comes to the port is left to others; where this is the last server, it is refused here.
        """
        self._edge.is_ending, self._edge.is_refusing = True, is_last
        if not is_last:
            for accepting in self._server.servers:
                accepting.close()
        now_s = asyncio.get_running_loop().time
        begun_s = now_s()
        while now_s() < begun_s + drain_s and (
            self._edge.num_open or (not is_last and self._has_connections() and now_s() < begun_s + LINGER_S)
        ):
            await asyncio.sleep(LOOK_EVERY_S)
        self._renewing.cancel()
        self._server.force_exit = self._server.should_exit = True
        with suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await self._serving

    def _has_connections(self) -> bool:
        return bool(self._server.server_state.connections)

    async def _renew_certificate(self) -> None:
        """Read the certificate again when its files are others: they end, and an endpoint need not."""
        if self._tls is None:
            return
        read: list[tuple[int, int]] = []  # what was read at the start may have been others since
        while True:
            await asyncio.sleep(CERTIFICATE_EVERY_S)
            with suppress(OSError):  # half written: once more, later
                if (now := _changed(self._tls)) != read and self._config.ssl is not None:
                    for context in (ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), self._config.ssl):  # a failure spoils one
                        context.load_cert_chain(*self._tls, NO_PASSWORD)
                    read = now


def _changed(files: tuple[Path, Path]) -> list[tuple[int, int]]:
    return [(found.st_mtime_ns, found.st_ino) for found in map(Path.stat, files)]


class Edge:
    """ASGI application around the gateway's: request ids, clients that leave, and the end."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.num_open = 0
        self.is_ending = self.is_refusing = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        request_id = _request_id(scope)
        visit = _Visit(receive)

        async def answered(message: Message) -> None:
            if message["type"] == "http.response.start":
                more = [(b"x-request-id", request_id), *([CLOSE] if self.is_ending else [])]
                message = {**message, "headers": [*message["headers"], *more]}
            elif not message.get("more_body", False):
                visit.is_answered = True
            await send(message)

        self.num_open += 1
        try:
            if self.is_refusing:
                problem = UnavailableError("The endpoint is ending", code="unavailable")
                await refusal(problem)(scope, receive, answered)
            elif not scope["path"].startswith("/"):  # OPTIONS *, CONNECT host
                await refusal(RequestError("The path does not begin with /"))(scope, receive, answered)
            else:
                await visit.while_there(self._app(scope, visit.receive, answered))
        finally:
            self.num_open -= 1


def _request_id(scope: Scope) -> bytes:
    """The client's own where there is one, else a new one; the scope's headers have it, once."""
    given = [value for name, value in scope["headers"] if name == b"x-request-id"]
    is_given = len(given) == 1 and REQUEST_ID.fullmatch(given[0])
    request_id = given[0] if is_given else str(uuid.uuid4()).encode()
    others = [header for header in scope["headers"] if header[0] != b"x-request-id"]
    scope["headers"] = [*others, (b"x-request-id", request_id)]
    return request_id


class _Visit:
    """A request that ends when its client has left: FastAPI would go on with an answer that nobody is there for."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._task: asyncio.Task[object] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._gone = asyncio.Event()
        self._has_left = self.is_answered = False

    async def while_there(self, answer: Awaitable[None]) -> None:
        """Wait for this until the client has left."""
        self._task = asyncio.current_task()
        try:
            await answer
        except asyncio.CancelledError:
            if not self._has_left or self._task is None or self._task.uncancel():
                raise
        finally:
            if self._watching is not None:
                self._watching.cancel()

    async def receive(self) -> Message:
        """What the client says: its body as the application reads it, then nothing until it has left."""
        if self._watching is not None:
            await self._gone.wait()
            return {"type": "http.disconnect"}
        message = await self._receive()
        if not message.get("more_body", False):
            self._watching = asyncio.create_task(self._watch(message))
        return message

    async def _watch(self, message: Message) -> None:
        while message["type"] != "http.disconnect":
            message = await self._receive()
        self._gone.set()
        if not self.is_answered and self._task is not None:
            self._has_left = True
            self._task.cancel()
