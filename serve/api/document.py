"""The OpenAPI document: what FastAPI reads from the routes, and beside it what a route may refuse, and streams."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
ASKED = {  # of a route under /v1
    "401": "No key, or not a valid one",
    "403": "The key's scopes do not allow this",
    "404": "There is no such model",
    "429": "Too many requests or tokens, or a quota is spent: Retry-After says when to ask again",
    "503": "Overloaded, or nobody that should answer is up: Retry-After says when to ask again",
}
BODY = {  # of one with a body
    "400": "A field is wrong",
    "408": "The body came too slowly",
    "413": "The body is too large",
}
STREAMED = ("/v1/completions", "/v1/chat/completions", "/v1/responses")


def describe(app: FastAPI) -> None:
    """Have the application say what its routes refuse and stream; FastAPI's own 422 is not among it."""
    plain = app.openapi

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = plain()
            schemas = found.setdefault("components", {}).setdefault("schemas", {})
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            schemas["Error"] = ERROR
            for path, operations in found["paths"].items():
                for operation in operations.values():
                    _describe(path, operation)
        return app.openapi_schema or plain()

    app.openapi = document  # type: ignore[method-assign]  # FastAPI's own way


def _describe(path: str, operation: dict[str, Any]) -> None:
    responses = operation["responses"]
    responses.pop("422", None)
    if path == "/metrics":
        responses["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
    if path in ("/healthz", "/readyz", "/metrics"):
        refused = {"503": "Not ready"} if path == "/readyz" else {}
    else:
        refused = ASKED | (BODY if "requestBody" in operation else {})
    for status, why in refused.items():
        schema = {} if path == "/readyz" else {"$ref": "#/components/schemas/Error"}
        responses[status] = {"description": why, "content": {"application/json": {"schema": schema}}}
    if path in STREAMED:
        responses["200"]["content"]["text/event-stream"] = {}
