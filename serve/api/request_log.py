"""The request log: a line of JSON a request, with who asked what, and never a prompt, an answer or a secret."""

from __future__ import annotations

import json
import logging
import os
from datetime import UTC, datetime
from pathlib import Path

from starlette.datastructures import Headers
from starlette.routing import Match
from starlette.types import Scope

from ulm.errors import ConfigError

MAX_SHOWN = 200  # characters of what is the client's own word
logger = logging.getLogger(__name__)


class RequestLog:
    """A file that several processes append whole lines to."""

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o600)
        except OSError as error:
            raise ConfigError("request_log", f"{path} cannot be written: {error.strerror}", "another path") from None
        self._has_failed = False

    def write(self, scope: Scope, status: int, ms: float, key_id: str | None, model: str | None, tokens: int) -> None:
        """Enter a request that has ended. A disk that is full ends the log, not the answers."""
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request": Headers(scope=scope).get("x-request-id", "")[:MAX_SHOWN] or None,
            "key": key_id,
            "path": _path(scope),
            "model": model,
            "status": status,
            "tokens": tokens,
            "ms": round(ms, 1),
        }
        try:
            os.write(self._file, json.dumps(line).encode() + b"\n")  # with O_APPEND one write is one piece
            self._has_failed = False
        except OSError as error:
            if not self._has_failed:
                logger.error("the request log cannot be written: %s", error.strerror)
            self._has_failed = True


def _path(scope: Scope) -> str | None:
    """The path of ours that was asked, also of a request that was refused before; a client's own may hold anything."""
    found = (route for route in scope["app"].routes if route.matches(scope)[0] is not Match.NONE)
    return getattr(scope.get("route") or next(found, None), "path", None)
