"""Requests that mean harm, the same ones for a seed: `hostile(url, number)` sends them, and says what came back."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

AT_ONCE = 8
SOON_S = 60.0  # longer than any of them takes; whoever waits so long waits for ever
SHORT_S = 0.3  # for an answer to what may not be whole, and need not have any
DEEP = 50_000


@dataclass(frozen=True)
class Answer:
    """What a hostile request was answered: a status, None for a connection that was closed, "hangs" for silence."""

    kind: str
    status: int | str | None
    sent: bytes  # its beginning

    @property
    def is_failure(self) -> bool:
        """Whether the server failed, and not the client."""
        return self.status == "hangs" or (isinstance(self.status, int) and self.status >= 500)


def hostile(url: str, number: int, seed: int = 0, headers: Mapping[str, str] | None = None) -> list[Answer]:
    """Send so many, of all kinds by turns, some side by side, to an endpoint's `url`, plain HTTP."""
    return asyncio.run(_all(url, number, seed, headers or {}))


async def _all(url: str, number: int, seed: int, headers: Mapping[str, str]) -> list[Answer]:
    parts, gate = urlsplit(url), asyncio.Semaphore(AT_ONCE)
    assert parts.hostname is not None and parts.port is not None
    host, port, kinds = parts.hostname, parts.port, list(KINDS)
    own = "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode()

    async def one(place: int) -> Answer:
        kind = kinds[place % len(kinds)]
        async with gate:  # some are of 4 MB
            sent = KINDS[kind](random.Random(f"{seed} {place}"), own)
            return Answer(kind, await _status(host, port, sent, kind in UNENDED), sent[:300])

    return list(await asyncio.gather(*(one(place) for place in range(number))))


async def _status(host: str, port: int, sent: bytes, is_unended: bool) -> int | str | None:
    """The status of the first answer to some bytes, all that this client has to say."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        async with asyncio.timeout(SHORT_S if is_unended else SOON_S):
            try:
                writer.write(sent)
                await writer.drain()
                said = (await reader.readline()).split()
                await reader.read()
            except ConnectionError:  # refused before all of it was sent
                return None
    except TimeoutError:
        return None if is_unended else "hangs"
    finally:
        writer.close()
    return int(said[1]) if len(said) > 1 and said[0].startswith(b"HTTP/") else None


# ---- what is said


def _head(path: str, own: bytes, *lines: bytes, method: str = "POST", version: str = "1.1") -> bytes:
    first = f"{method} {path} HTTP/{version}\r\nHost: 127.0.0.1\r\nConnection: close\r\n".encode()
    return first + own + b"".join(line + b"\r\n" for line in lines) + b"\r\n"


def _post(path: str, body: bytes, own: bytes, *lines: bytes) -> bytes:
    return _head(path, own, b"Content-Type: application/json", b"Content-Length: %d" % len(body), *lines) + body


def _body(draw: random.Random) -> tuple[str, dict[str, Any]]:
    """A path, and a body that it takes."""
    fine: list[tuple[str, dict[str, Any]]] = [
        ("completions", {"prompt": "abc", "max_tokens": 4}),
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 4}),
        ("responses", {"input": "abc", "max_output_tokens": 4}),
        ("embeddings", {"input": ["a", "b"]}),
        ("tokenize", {"prompt": "abc"}),
        ("detokenize", {"tokens": [1, 2]}),
    ]
    path, body = draw.choice(fine)
    return f"/v1/{path}", {"model": draw.choice(("a", "swarm", "nope")), **body}


FIELDS = (
    "model prompt messages input max_tokens temperature top_p top_k n best_of stream stop seed logit_bias logprobs echo"
    " suffix ulm user response_format text tools metadata stream_options tokens encoding_format dimensions oops"
).split()
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 2**31, 2**63, 10**400, 1e308, -0.0, 0.5, "", "\0", "a" * 70_000, "\ud800", "𝕬" * 99),
    *([], {}, [[]], [{}] * 2_000, [-1] * 2_000, [2**63] * 99, [["a"]], ["a"] * 65, {"a": {"b": {}}}, {"1": 101}),
    *({str(i): 0 for i in range(3_000)}, {"budget": {"max_calls": -1}}, {"members": ["a", "a"]}, {"top_k": 2**80}),
    *({"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "a", "schema": {"oops": 1}}}),
    *({"type": "json_schema", "json_schema": {"name": "a", "schema": {"pattern": "(a*)*" * 9, "type": "string"}}},),
)
DEEP_JSON = (b'{"a":' * DEEP, b"[" * DEEP, b'{"prompt":' + b"[" * DEEP + b"]" * DEEP + b"}")
NO_JSON = (
    *(b'{"model":', b'{"model":"a","prompt":"a"} x', b"[]", b"null", b"0", b'"a"', b"\0" * 99, b"\xff\xfe{\0}\0"),
    *(b'{"model":"a","prompt":"\xff"}', b'\xef\xbb\xbf{"model":"a"}', b"{'model':'a'}", b'{"model":"a",}'),
    *(b'{"model":"a","temperature":NaN}', b'{"model":"a","seed":Infinity}', b'{"model":"a","top_p":-Infinity}'),
    *(b'{"model":"a","model":"b","prompt":"a","prompt":{}}', b'{"seed":' + b"9" * 5_000 + b"}", b'{"a":1e99999}'),
    *('{"model":"a","prompt":"a"}'.encode(coding) for coding in ("utf-16", "utf-32", "utf-16-be", "utf-7")),
)
HEADERS = (
    *(
        b"x-request-id: \xff\xfe",
        b"x-request-id: " + b"a" * 9_000,
        b"x-session-id: \xff",
        b"serve_multiplexed_model_id: \xff",
    ),
    *(b"x-request-timeout-seconds: 1e-9", b"x-request-timeout-seconds: \xff", b"x-request-disconnect-disabled: ?1"),
    *(
        b"Authorization: Bearer " + b"a" * 9_000,
        b"Authorization: Bearer \xff",
        b"Authorization:",
        b"Host: [",
        b"Host: \xff",
    ),
    *(
        b"Content-Encoding: gzip",
        b"Content-Type: text/plain",
        b"Content-Type: \xff",
        b"Accept: \xff",
        b"Expect: 100-continue",
    ),
    *(b"Origin: null", b"Cookie: " + b"a=b; " * 2_000, b"traceparent: \xff", b"X-HTTP-Method-Override: DELETE"),
    *(
        b"X-Forwarded-For: \xff",
        b"Range: bytes=0-1",
        b"Transfer-Encoding: gzip",
        b"Upgrade: h2c",
        b"a: " + b"b" * 200_000,
    ),
    *(b"\r\n".join(b"a%d: b" % n for n in range(9_000)), b"a" * 70_000 + b": b", b" folded: a", b"no colon", b"\0: \0"),
)
PATHS = (
    *(
        "//v1/models",
        "/v1/../metrics",
        "/v1%2fmodels",
        "/%00",
        "/%ff",
        "/v1/models/%2e%2e/%0a",
        "/v1/models/" + "a" * 9_000,
    ),
    *(
        "*",
        "127.0.0.1:80",
        "http://evil/v1/models",
        "/v1/models?" + "a=b&" * 3_000,
        "/docs/../metrics",
        "/-/../metrics",
    ),
    *("/" + "a" * 90_000, "/v1/models/{}", "/healthz/", "/openapi.json/x", "/v1/completions/", "/;/", "/\u00e9"),
)
METHODS = ("GET", "HEAD", "OPTIONS", "TRACE", "CONNECT", "PUT", "PATCH", "DELETE", "PROPFIND", "get", "G\0T", "PRI")
CHUNKS = (
    b"zz\r\n",
    b"-1\r\n",
    b"ffffffffffffffffff\r\n",
    b"1\r\nab\r\n",
    b"5;a=b\r\n{}",
    b"0\r\nx: y",
    b"\r\n\r\n",
    b"1 \r\n{",
)


def _mutated(draw: random.Random, own: bytes) -> bytes:
    path, body = _body(draw)
    for _ in range(draw.randint(1, 2)):
        body[draw.choice(FIELDS)] = draw.choice(VALUES)
    return _post(path, json.dumps(body).encode(), own)


def _no_json(draw: random.Random, own: bytes) -> bytes:
    return _post(_body(draw)[0], draw.choice((*NO_JSON, *DEEP_JSON)), own)


def _odd_header(draw: random.Random, own: bytes) -> bytes:
    path, body = _body(draw)
    return _post(path, json.dumps(body).encode(), own, *draw.sample(HEADERS, draw.randint(1, 2)))


def _odd_path(draw: random.Random, own: bytes) -> bytes:
    return _head(draw.choice(PATHS), own, method=draw.choice(METHODS))


def _cut(draw: random.Random, own: bytes) -> bytes:
    """A request that ends too early, anywhere."""
    path, body = _body(draw)
    whole = _post(path, json.dumps(body).encode(), own)
    return whole[: draw.randrange(1, len(whole))]


def _chunked(draw: random.Random, own: bytes) -> bytes:
    head = _head("/v1/completions", own, b"Content-Type: application/json", b"Transfer-Encoding: chunked")
    return head + b"".join(draw.choices(CHUNKS, k=3))


def _lengths(draw: random.Random, own: bytes) -> bytes:
    """Bodies that are not as long as they say, or say so twice."""
    lengths = (b"-1", b"abc", b"+3", b"0x10", b"1" * 30, b"1099511627776", b"3, 3", b"")
    lines = [b"Content-Length: " + length for length in draw.choices(lengths, k=draw.randint(1, 2))]
    return _head("/v1/completions", own, b"Content-Type: application/json", *lines) + b'{"model":"a"}'


def _large(draw: random.Random, own: bytes) -> bytes:
    """A body of almost 4 MB, or more, of wrong items."""
    unit = draw.choice((b"{}", b"-1", b'""', b"[[]]", b"1e999", b'{"role":0}', b"null"))
    field = draw.choice((b"prompt", b"messages", b"input", b"tokens", b"stop", b"tools", b"ulm", b"oops", b"include"))
    number = draw.choice((4 << 20, 5 << 20)) // (len(unit) + 1) - 99
    return _post(_body(draw)[0], b'{"model":"a","%s":[%s]}' % (field, b",".join([unit] * number)), own)


def _websocket(draw: random.Random, own: bytes) -> bytes:
    key = draw.choice((b"dGhlIHNhbXBsZSBub25jZQ==", b"x", b"\xff"))
    lines = b"Upgrade: websocket", b"Connection: Upgrade", b"Sec-WebSocket-Version: 13", b"Sec-WebSocket-Key: " + key
    return _head(draw.choice(("/v1/completions", "/-/routes", "/%ff")), own, *lines, draw.choice(HEADERS), method="GET")


def _several(draw: random.Random, own: bytes) -> bytes:
    """Several requests at once on one connection, the last of them cut."""
    whole = [_mutated(draw, own).replace(b"Connection: close\r\n", b"") for _ in range(3)]
    return b"".join(whole) + _cut(draw, own)


def _other_protocol(draw: random.Random, own: bytes) -> bytes:
    """What is no HTTP/1.1."""
    hello = bytes.fromhex("16030100c8010000c40303") + bytes(190)
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9)
    versions = [_head("/v1/models", own, method="GET", version=version) for version in ("1.0", "0.9", "3.7", "", "a")]
    plain = (b"GET /healthz\r\n\r\n", b"\r\n" * 99, b"\0" * 999, b"{}", draw.randbytes(999), b"SSH-2.0-a\r\n")
    return draw.choice((hello, preface, *versions, *plain))


KINDS: dict[str, Callable[[random.Random, bytes], bytes]] = {
    "a wrong field": _mutated,
    "no JSON": _no_json,
    "an odd header": _odd_header,
    "an odd path": _odd_path,
    "cut": _cut,
    "odd chunks": _chunked,
    "odd lengths": _lengths,
    "a wrong field again": _mutated,
    "a websocket": _websocket,
    "several at once": _several,
    "another protocol": _other_protocol,
    "much too large": _large,
}
UNENDED = {"cut", "odd chunks", "odd lengths", "several at once", "another protocol"}
