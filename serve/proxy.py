"""What Ray Serve's proxy says by itself, as OpenAI's errors: nobody listens yet, or any more; queues are full.

It would say so in plain text, and where a gateway dies it would say nothing. There is a proxy where the endpoint is
deployed by a config file of Serve, as on Kubernetes (deploy/kuberay), which tells it of this by Serve's variable for
middlewares; `ulm serve up` does without, see server.py.
"""

from __future__ import annotations

import json
import uuid

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve import connections
from serve.api.refusals import error_body, refusal
from ulm.errors import OverloadedError, RequestError, UnavailableError

VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
RETRY_AFTER_S = 1.0
# Serve takes orders from these headers, of anybody: wait so long, go on when the client has left, prefer that replica.
ORDERS = frozenset(
    (b"x-request-timeout-seconds", b"x-request-disconnect-disabled", b"serve-multiplexed-model-id", b"x-session-id")
)
LOST = "the gateway that worked on this request has ended"


def middlewares() -> list[Middleware]:
    """What Serve's proxies put around themselves; called in each before it listens."""
    connections.bound()
    return [Middleware(Plain)]


class Plain:
    """ASGI middleware: errors in plain text become those of the endpoint, and what ends without an end gets one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and its answer back."""
        scope["headers"] = [header for header in scope["headers"] if _may_pass(*header)]
        if scope["type"] != "http" or scope["path"].startswith("/-/"):  # the proxy's own pages
            await self._app(scope, receive, send)
            return
        if not scope["path"].startswith("/"):  # OPTIONS *, CONNECT host
            await refusal(RequestError("The path does not begin with /"))(scope, receive, send)
            return
        answer = _Answer(scope, receive, send)
        await self._app(scope, receive, answer.send)
        await answer.end()


def _may_pass(name: bytes, value: bytes) -> bool:
    name = name.replace(b"_", b"-")
    return name not in ORDERS and (name != b"x-request-id" or connections.REQUEST_ID.fullmatch(value) is not None)


class _Answer:
    """One answer on its way to the client."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._has_begun = self._has_ended = self._is_stream = False

    async def send(self, message: Message) -> None:
        """A message of the answer."""
        if self._has_ended:  # refused: the text is not sent
            return
        if message["type"] == "http.response.start":
            status, headers = message["status"], dict(message["headers"])
            kind = headers.get(b"content-type", b"")
            if status > 400 and kind.startswith(b"text/plain"):  # 400 is a browser's page of no listed origin
                await self._refuse(status, headers.get(b"x-request-id"))
                return
            self._has_begun, self._is_stream = True, kind.startswith(b"text/event-stream")
        elif message["type"] == "http.response.body":
            self._has_ended = not message.get("more_body", False)
        await self._send(message)

    async def end(self) -> None:
        """The answer's end, where nobody has sent one: the gateway is gone, or the client."""
        if not self._has_begun and not self._has_ended:
            await self._refuse(500, None)
        elif self._is_stream and not self._has_ended:
            last = json.dumps(error_body(LOST, "server_error", None, "unavailable"))
            await self._send({"type": "http.response.body", "body": f"data: {last}\n\n".encode()})

    async def _refuse(self, status: int, request_id: bytes | None) -> None:
        self._has_ended = True
        error: OverloadedError
        if status == 404:
            error = UnavailableError("The endpoint is starting or ending", code="unavailable")
        elif status == 503:
            error = OverloadedError("Too many requests wait for a gateway", code="overloaded")
        else:
            error = UnavailableError(f"No answer: {LOST}", code="unavailable")
        error.retry_after_s = RETRY_AFTER_S
        response = refusal(error)
        response.headers["x-request-id"] = request_id.decode() if request_id else str(uuid.uuid4())
        await response(self._scope, self._receive, self._send)
