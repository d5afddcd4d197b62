"""What is refused, in OpenAI's error shape: bodies that are too large, invalid or asked of the wrong place."""

from __future__ import annotations

import math
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ulm.errors import OverloadedError, RequestError, UnsupportedError

MAX_BODY_BYTES = 4 << 20
MAX_SHOWN = 200  # characters of a field's name, which may be the client's own word


def error_body(message: str, type_: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error shape."""
    return {"error": {"message": message, "type": type_, "param": param, "code": code}}


class BoundedBody:
    """ASGI middleware: a body is read up to MAX_BODY_BYTES, whatever its headers say, and then refused with 413."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything on, counting."""
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > MAX_BODY_BYTES:
                raise HTTPException(413, f"The body is larger than {MAX_BODY_BYTES} bytes")
            return message

        await self._app(scope, counted, send)


def handle_errors(app: FastAPI) -> None:
    """Turn every error that a route may raise into a response."""

    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> JSONResponse:
        headers = {"Retry-After": str(math.ceil(error.retry_after_s))} if isinstance(error, OverloadedError) else None
        return JSONResponse(error_body(str(error), error.type, error.param, error.code), error.status, headers)

    @app.exception_handler(UnsupportedError)
    async def unsupported(_: Request, error: UnsupportedError) -> JSONResponse:
        return JSONResponse(error_body(str(error), "invalid_request_error", None, "unsupported"), 400)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        path = first["loc"][1:]
        if path[:1] != ("ulm",):  # elsewhere the rest may name branches of a union
            path = path[:1]
        place = ".".join(map(str, path))[:MAX_SHOWN]
        if first["type"] == "json_invalid":
            return JSONResponse(error_body(f"The body is not JSON: {first['msg']}", "invalid_request_error"), 400)
        problem = "unknown field" if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
        message = f"{place}: {problem}" if place else problem
        return JSONResponse(error_body(message, "invalid_request_error", place or None), 400)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        type_ = "invalid_request_error" if error.status_code < 500 else "server_error"
        return JSONResponse(error_body(str(error.detail), type_), error.status_code)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse(error_body(f"{type(error).__name__}; see the server's log", "server_error"), 500)
