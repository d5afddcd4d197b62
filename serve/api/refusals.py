"""What is refused, in OpenAI's error shape: bodies that are too large, invalid or asked of the wrong place."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ulm.errors import (
    InvalidKeyError,
    ModelNotFoundError,
    OverloadedError,
    QuotaError,
    RateLimitError,
    RequestError,
    UnavailableError,
    UnsupportedError,
)

if TYPE_CHECKING:  # torch is behind it, which Serve's proxy does without
    from serve.api.spent import Record

MAX_BODY_BYTES = 4 << 20
BODY_S = 60.0
MAX_SHOWN = 200  # characters of a field's name, which may be the client's own word
# Fields whose errors say where in them, and how much of that is `param`.
PATHS = {("ulm",): None, ("response_format",): 1, ("text",): 2}
# Why requests are sent away, as ulm_requests_refused_total has it: the first that an error is of, or its status.
WHY = {
    UnavailableError: "members_down",
    OverloadedError: "engines_full",
    InvalidKeyError: "key",  # revoked since it was let in
    RateLimitError: "rate_limit",
    QuotaError: "quota",
    ModelNotFoundError: "model",
    RequestError: "invalid",
}
GATEWAY_FULL = "gateway_full"
WHY_STATUS = {404: "path", 405: "path", 408: "too_slow", 413: "too_large"}
OPERATORS = ("/healthz", "/readyz", "/metrics")  # answered whatever else is under way


def error_body(message: str, type_: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error shape."""
    return {"error": {"message": message, "type": type_, "param": param, "code": code}}


class BoundedBody:
    """ASGI middleware: a body is read up to MAX_BODY_BYTES, whatever its headers say, and then refused with 413.

    One that has not come after BODY_S is refused with 408: it has a place among those that are worked on.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything on, counting."""
        num_bytes = 0
        until_s: float | None = asyncio.get_running_loop().time() + BODY_S  # None: it is whole

        async def counted() -> Message:
            nonlocal num_bytes, until_s
            try:
                async with asyncio.timeout_at(until_s):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"The body did not come within {BODY_S:.0f} s") from None
            if not message.get("more_body", False):
                until_s = None
            num_bytes += len(message.get("body", b""))
            if num_bytes > MAX_BODY_BYTES:
                raise HTTPException(413, f"The body is larger than {MAX_BODY_BYTES} bytes")
            return message

        await self._app(scope, counted, send)


class BoundedOpen:
    """ASGI middleware: requests beyond `max_open` at once are refused with 503, before anything of them is read."""

    def __init__(self, app: ASGIApp, max_open: int, record: Record) -> None:
        self._app, self._max_open, self._record = app, max_open, record
        self._num_open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http" or scope["path"] in OPERATORS:
            await self._app(scope, receive, send)
        elif self._num_open >= self._max_open:
            self._record("ulm_requests_refused_total", 1, {"why": GATEWAY_FULL})
            problem = f"{self._max_open} requests are being worked on, as many as may be at once"
            await refusal(OverloadedError(problem, code="overloaded"))(scope, receive, send)
        else:
            self._num_open += 1
            try:
                await self._app(scope, receive, send)
            finally:
                self._num_open -= 1


def refusal(error: RequestError) -> JSONResponse:
    """The response to a request that is refused."""
    return JSONResponse(error_body(str(error), error.type, error.param, error.code), error.status, error.headers)


def handle_errors(app: FastAPI, record: Record) -> None:
    """Turn every error that a route may raise into a response, and count what is refused."""

    def sent_away(why: str) -> None:
        record("ulm_requests_refused_total", 1, {"why": why})

    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> JSONResponse:
        sent_away(next(why for cls, why in WHY.items() if isinstance(error, cls)))
        return refusal(error)

    @app.exception_handler(UnsupportedError)
    async def unsupported(_: Request, error: UnsupportedError) -> JSONResponse:
        sent_away("invalid")
        return JSONResponse(error_body(str(error), "invalid_request_error", None, "unsupported"), 400)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        sent_away("invalid")
        first = error.errors()[0]
        path = first["loc"][1:]
        if path[:1] not in PATHS:  # elsewhere the rest may name branches of a union
            path = path[:1]
        place = ".".join(map(str, path))[:MAX_SHOWN]
        param = ".".join(map(str, path[: PATHS.get(path[:1])]))[:MAX_SHOWN]
        if first["type"] == "json_invalid":
            why = first["ctx"]["error"]
            return JSONResponse(error_body(f"The body is not JSON: {why}", "invalid_request_error"), 400)
        if first["type"] == "model_attributes_type" and not place:
            message = "The body has to be a JSON object, sent with the header Content-Type: application/json"
            return JSONResponse(error_body(message, "invalid_request_error"), 400)
        problem = _problem(first)
        message = f"{place}: {problem}" if place else problem
        return JSONResponse(error_body(message, "invalid_request_error", param or None), 400)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        sent_away(WHY_STATUS.get(error.status_code, "invalid"))
        type_ = "invalid_request_error" if error.status_code < 500 else "server_error"
        message = str(error.detail)
        if error.status_code in (404, 405):
            asked = f"{request.method} {request.url.path}"[:MAX_SHOWN]
            message = f"{message}: there is no {asked} here; /docs lists what there is"
        return JSONResponse(error_body(message, type_), error.status_code)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse(error_body(f"{type(error).__name__}; see the server's log", "server_error"), 500)


def _problem(error: dict[str, Any]) -> str:
    """What is wrong with a field, for people."""
    if error["type"] == "extra_forbidden":
        return "unknown field"
    if error["type"] == "none_required" or error["type"] == "too_long" and error["ctx"]["max_length"] == 0:
        return "is not offered here; leave it out"
    return str(error["msg"]).removeprefix("Value error, ")
