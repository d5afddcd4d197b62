"""What a client's connection may take: time and room for headers and what is no request, and time to read."""

from __future__ import annotations

import asyncio
import re

from uvicorn.config import HTTP_PROTOCOLS
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEADER_BYTES = 64 << 10  # beyond what came with their end
HEADERS_S = 30.0
READ_S = 30.0  # that a client may leave what it is sent where it is
REQUEST_ID = re.compile(rb"[\x20-\x7e]{1,512}")  # as OpenAI has a client's own


class BoundedConnection(HttpToolsProtocol):
    """uvicorn's protocol, which would wait for headers for ever, and keep them all, and for clients that do not read.

    There are no websockets, whose handshake has the same fault.
    """

    _timer: asyncio.TimerHandle | None = None  # runs while headers are awaited, or what is no request comes
    _num_bytes = 0  # that came since the last headers, or piece of a body: of headers, trailers, or nothing
    _is_deaf = False  # a request came before the answer to the one before: this connection ends with that
    _writing: asyncio.TimerHandle | None = None  # runs while a client does not read
    _num_unread = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there."""
        super().connection_made(transport)
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """It has left."""
        self._headers_came()
        super().connection_lost(exc)
        self.resume_writing()

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        if self._is_answering():
            # uvicorn would not notice who leaves then, and not read on; clients ask again, as RFC 9112 (9.3.2) has it
            self._is_deaf, self.cycle.keep_alive = True, False
            return
        super().on_message_begin()
        self._headers_came()
        self._await_headers()

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer."""
        if not self._is_deaf:
            super().on_header(name, value)

    def on_url(self, url: bytes) -> None:
        """A piece of a path."""
        if not self._is_deaf:
            super().on_url(url)

    def on_headers_complete(self) -> None:
        """All headers of a request are there."""
        if self._is_deaf:
            return
        self._headers_came()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of a body."""
        self._num_bytes = 0
        if not self._is_deaf:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """All of a request is there."""
        if not self._is_deaf:
            super().on_message_complete()

    def data_received(self, data: bytes) -> None:
        """Some bytes."""
        if self._is_deaf:
            return
        self._num_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._num_bytes > MAX_HEADER_BYTES:
            if self._is_answering():
                self.transport.close()
            else:
                self.send_400_response(f"The headers are larger than {MAX_HEADER_BYTES} bytes.")
        elif self._timer is None and not self._is_answering():  # the body of a refused request, or empty lines
            self._await_headers()

    def pause_writing(self) -> None:
        """The client does not read what there is."""
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        """It does."""
        super().resume_writing()
        if self._writing is not None:
            self._writing.cancel()
        self._writing = None

    def _should_upgrade(self) -> bool:
        return False  # a wish, which may be ignored

    def _unsupported_upgrade_warning(self) -> None:
        """Not in the log, which would be anybody's to fill."""

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _await_headers(self) -> None:
        self._timer, self._num_bytes = self.loop.call_later(HEADERS_S, self._is_late), 0

    def _headers_came(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._num_bytes = None, 0

    def _is_late(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()

    def _await_reader(self) -> None:
        self._num_unread = self.transport.get_write_buffer_size()
        self._writing = self.loop.call_later(READ_S, self._is_unread)

    def _is_unread(self) -> None:
        if self.transport.get_write_buffer_size() < self._num_unread:
            self._await_reader()
        else:
            self.transport.abort()  # to close would be to wait until it has read


def bound() -> None:
    """Have servers of this process, which leave the choice to uvicorn, use it: Serve's proxy does."""
    HTTP_PROTOCOLS["auto"] = f"{__name__}:{BoundedConnection.__name__}"
