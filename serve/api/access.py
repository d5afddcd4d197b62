"""Who gets in: keys, limits and the request log around the application, before anything of a body is read."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Protocol
from urllib.parse import urlsplit

from fastapi import Depends, FastAPI, Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api.refusals import refusal
from serve.api.request_log import RequestLog
from serve.api.spent import Record
from ulm.errors import InvalidKeyError, QuotaError, RateLimitError, RequestError, ScopeError, UnavailableError
from ulm.recipes.serve import Cors

OPEN = ("/healthz", "/readyz", "/docs", "/openapi.json")  # nothing of anybody's is there
INFER = ("models", "completions", "chat/completions", "responses", "embeddings", "tokenize", "detokenize")
EXPOSED = (
    "x-request-id",
    "openai-processing-ms",
    "retry-after",
    *(f"x-ratelimit-{what}-{kind}" for kind in ("requests", "tokens") for what in ("limit", "remaining", "reset")),
)
WHY = {
    InvalidKeyError: "key",
    ScopeError: "key",
    RateLimitError: "rate_limit",
    QuotaError: "quota",
    UnavailableError: "accounts_down",
}


def scope_of(path: str) -> str | None:
    """The scope that a path needs, None where no key is; what is not listed is for admins."""
    if path in OPEN:
        return None
    inner = path.removeprefix("/v1").removeprefix("/")
    if inner in INFER and (path.startswith("/v1/") or "tokenize" in inner) or path.startswith("/v1/models/"):
        return "infer"
    return "admin"


class Admission(Protocol):
    """What a key may do: serve/accounts.py's Admitted."""

    @property
    def key_id(self) -> str: ...
    @property
    def models(self) -> frozenset[str] | None: ...
    @property
    def is_metered(self) -> bool: ...
    @property
    def headers(self) -> Mapping[str, str]: ...


class Accounts(Protocol):
    """Who is asked: serve/limits.py's RemoteAccounts, or the same in this process."""

    async def admit(self, authorization: str | None, scope: str) -> Admission:
        """Check a key and count a request; raises the RequestError of a refusal."""
        ...

    async def reserve(self, key_id: str, tokens: int) -> tuple[str, dict[str, str]]:
        """Take tokens out of the key's limits until they are settled; a reservation's name, and headers."""
        ...

    async def settle(self, reservation: str, used: int) -> None:
        """Say what was used of a reservation; written when this returns."""
        ...

    def later(self, reservation: str | None, key_id: str, used: int) -> None:
        """The same, or the use of a key without limits, not waited for."""
        ...


class Visit:
    """One request: what it may use, and what it did use. Without keys all of it, and nobody counts."""

    def __init__(self, accounts: Accounts | None = None, admitted: Admission | None = None) -> None:
        self._accounts, self._admitted = accounts, admitted
        self._reservation: str | None = None
        self._is_told = False
        self.key_id = admitted.key_id if admitted else None  # whose it is
        self.headers = dict(admitted.headers) if admitted else {}
        self.model: str | None = None  # for the log
        self.tokens = 0  # used so far

    @property
    def models(self) -> frozenset[str] | None:
        """The names that it may use; None: all."""
        return self._admitted.models if self._admitted else None

    async def reserve(self, tokens: int) -> None:
        """Before work that may take so many tokens; raises where the key has not so many left."""
        if self._accounts is not None and self._admitted is not None and self._admitted.is_metered:
            self._reservation, more = await self._accounts.reserve(self._admitted.key_id, tokens)
            self.headers |= more

    @contextmanager
    def owing(self, tokens: int) -> Iterator[None]:
        """Around the work on a prompt of so many: who leaves meanwhile pays for it, and nobody for what fails."""
        self.tokens = tokens
        try:
            yield
        except Exception:
            self.tokens = 0
            raise

    async def take(self, tokens: int) -> None:
        """For work that is done, and as long as its tokens."""
        await self.reserve(tokens)
        await self.used(tokens)

    async def used(self, tokens: int) -> None:
        """Before the last of an answer goes out: what it took is written when this returns."""
        self.tokens, self._is_told = tokens, True
        if self._accounts is None or self._admitted is None:
            return
        if self._reservation is None:
            self._accounts.later(None, self._admitted.key_id, tokens)
            return
        try:
            await self._accounts.settle(self._reservation, tokens)
        except BaseException as error:  # all that was reserved counts until it can be told
            self._accounts.later(self._reservation, self._admitted.key_id, tokens)
            if not isinstance(error, UnavailableError):  # the client has left
                raise

    def end(self) -> None:
        """After a request, however it ended."""
        if not self._is_told and self._accounts is not None and self._admitted is not None:
            if self._reservation is not None or self.tokens:
                self._accounts.later(self._reservation, self._admitted.key_id, self.tokens)


async def visit_of(request: Request) -> Visit:
    """The visit that a request is."""
    visit: Visit = request.scope["ulm.visit"]
    return visit


Visiting = Annotated[Visit, Depends(visit_of)]


@dataclass(frozen=True)
class Guard:
    """What stands around the application."""

    accounts: Accounts | None = None  # None: no keys
    is_local: bool = False  # no keys because of the address alone: then requests are for that address, too
    log: RequestLog | None = None
    cors: Cors | None = None

    def add_to(self, app: FastAPI, record: Record) -> None:
        """Stand around an application; CORS outermost, for a browser's preflight has no key and refusals are read."""
        app.add_middleware(Access, guard=self, record=record)
        if self.cors is not None:
            app.add_middleware(
                CORSMiddleware,
                allow_origins=self.cors.origins,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=EXPOSED,
                max_age=self.cors.max_age_s,
            )


@dataclass
class _Answer:
    """What is known of a response for the log."""

    status: int = 500
    started_s: float = field(default_factory=time.perf_counter)

    @property
    def ms(self) -> float:
        return 1e3 * (time.perf_counter() - self.started_s)


class Access:
    """ASGI middleware: a request is let in or refused, its response gets its headers, and its end is told."""

    def __init__(self, app: ASGIApp, guard: Guard, record: Record) -> None:
        self._app, self._guard, self._record = app, guard, record

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":  # there are no websockets, which the application says itself
            await self._app(scope, receive, send)
            return
        answer, visit = _Answer(), Visit()

        async def answered(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["openai-processing-ms"] = f"{answer.ms:.0f}"
                for name, value in visit.headers.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            try:
                visit = await self._visit(scope)
            except RequestError as error:
                visit.key_id = error.key_id
                self._record("ulm_requests_refused_total", 1, {"why": WHY[type(error)]})
                await refusal(error)(scope, receive, answered)
                return
            scope["ulm.visit"] = visit
            await self._app(scope, receive, answered)
        finally:
            visit.end()
            if self._guard.log is not None:
                self._guard.log.write(scope, answer.status, answer.ms, visit.key_id, visit.model, visit.tokens)

    async def _visit(self, scope: Scope) -> Visit:
        headers = Headers(scope=scope)
        if self._guard.is_local and not _is_here(headers.get("host")):
            # a page on the web whose name leads to this machine could else have its visitors' browsers ask
            problem = "This endpoint answers requests for this machine only, by an address such as 127.0.0.1"
            raise ScopeError(f"{problem}; `keys: false` or `keys: true` in its recipe lets other names in")
        wanted, accounts = scope_of(scope["path"]), self._guard.accounts
        if accounts is None or wanted is None:
            return Visit()
        given = headers.getlist("authorization")
        if len(given) > 1:
            raise InvalidKeyError("There is more than one header Authorization; send the one with this endpoint's key")
        return Visit(accounts, await accounts.admit(given[0] if given else None, wanted))


def _is_here(host: str | None) -> bool:
    """Whether a Host header names this machine's own address."""
    try:
        name = urlsplit(f"//{host or ''}").hostname
        return name == "localhost" or ipaddress.ip_address(name or "").is_loopback
    except ValueError:
        return False
