"""How long a client may take for the headers of a request, and how large they may be."""

from __future__ import annotations

import asyncio
import re

from uvicorn.config import HTTP_PROTOCOLS
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEADER_BYTES = 64 << 10  # beyond what came with their end
HEADERS_S = 30.0
REQUEST_ID = re.compile(rb"[\x20-\x7e]{1,512}")  # as OpenAI has a client's own


class BoundedHeaders(HttpToolsProtocol):
    """uvicorn's protocol, which would wait for headers for ever, and keep them all.

    There are no websockets, whose handshake has the same fault.
    """

    _timer: asyncio.TimerHandle | None = None  # runs while headers are awaited
    _num_bytes = 0  # of headers that have not ended

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there."""
        super().connection_made(transport)
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """It has left."""
        self._headers_came()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        if self._timer is None:
            self._await_headers()

    def on_headers_complete(self) -> None:
        """All headers of a request are there."""
        self._headers_came()
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        """Some bytes."""
        super().data_received(data)
        if self._timer is None:
            return
        self._num_bytes += len(data)
        if self._num_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
            self.send_400_response(f"The headers are larger than {MAX_HEADER_BYTES} bytes.")

    def _should_upgrade(self) -> bool:
        return False  # a wish, which may be ignored

    def _unsupported_upgrade_warning(self) -> None:
        """Not in the log, which would be anybody's to fill."""

    def _await_headers(self) -> None:
        self._timer, self._num_bytes = self.loop.call_later(HEADERS_S, self._is_late), 0

    def _headers_came(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None

    def _is_late(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:  # an answer to the request before is under way
            self._await_headers()
        elif not self.transport.is_closing():
            self.transport.close()


def bound() -> None:
    """Have servers of this process, which leave the choice to uvicorn, use it: Serve's proxy does."""
    HTTP_PROTOCOLS["auto"] = f"{__name__}:{BoundedHeaders.__name__}"
