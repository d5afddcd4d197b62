"""Clients of an endpoint, many at once, in a thread: each asks again as soon as it was answered."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp

TIMEOUT_S = 120.0


@dataclass
class Outcome:
    """What a client saw of one request. Times are of the monotonic clock, seconds."""

    is_stream: bool
    asked_s: float
    first_s: float | None = None  # when its first text came; a whole answer has all of it at once
    ended_s: float = 0.0
    text: str = ""
    problem: str | None = None  # why it is no whole answer

    @property
    def seconds(self) -> float:
        """From the question to the last byte."""
        return self.ended_s - self.asked_s


@dataclass
class Clients:
    """What they have been answered so far."""

    outcomes: list[Outcome] = field(default_factory=list)
    num_open: int = 0

    def problems(self) -> list[str]:
        """What went wrong, each once a request."""
        return [f"{outcome.problem} after {outcome.text!r}" for outcome in self.outcomes if outcome.problem]


async def ask(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Outcome:
    """One completion; whatever happens is an outcome."""
    outcome = Outcome(bool(body.get("stream")), time.monotonic())
    try:
        async with session.post(f"{url}/completions", json=body) as response:
            if response.status != 200:
                outcome.problem = f"{response.status} {await response.text()}"
            elif outcome.is_stream:
                await _read_events(response, outcome)
            else:
                outcome.text = json.loads(await response.read())["choices"][0]["text"]
                outcome.first_s = time.monotonic()
    except (aiohttp.ClientError, TimeoutError) as error:
        outcome.problem = f"{type(error).__name__}: {error}"
    outcome.ended_s = time.monotonic()
    return outcome


async def _read_events(response: aiohttp.ClientResponse, outcome: Outcome) -> None:
    async for line in response.content:
        data = line.removeprefix(b"data: ").strip()
        if data == b"[DONE]":
            return
        if data:
            said = json.loads(data)
            if "error" in said:
                outcome.problem = str(said["error"])
                return
            outcome.text += said["choices"][0]["text"] if said["choices"] else ""
            if outcome.first_s is None and outcome.text:
                outcome.first_s = time.monotonic()
    outcome.problem = "the stream has no end"


def session() -> aiohttp.ClientSession:
    """Without a limit of connections, or an environment's proxies."""
    connector = aiohttp.TCPConnector(limit=0)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(TIMEOUT_S), trust_env=False)


@contextmanager
def clients(url: str, bodies: list[dict[str, Any]], *, again: bool = True) -> Iterator[Clients]:
    """A client for each body; at the block's end they ask no more, and what is under way is waited for."""
    seen, stopped = Clients(), threading.Event()

    async def client(asking: aiohttp.ClientSession, body: dict[str, Any]) -> None:
        while True:
            seen.num_open += 1
            seen.outcomes.append(await ask(asking, url, body))
            seen.num_open -= 1
            if stopped.is_set() or not again:
                return

    async def all_of_them() -> None:
        async with session() as asking:
            await asyncio.gather(*(client(asking, body) for body in bodies))

    thread = threading.Thread(target=lambda: asyncio.run(all_of_them()), name="clients")
    thread.start()
    try:
        yield seen
    finally:
        stopped.set()
        thread.join()


def wait_until_begun(seen: Clients, number: int, timeout_s: float = 30.0) -> None:
    """Returns once so many requests have been answered."""
    deadline_s = time.monotonic() + timeout_s
    while len(seen.outcomes) < number:
        assert time.monotonic() < deadline_s, f"{len(seen.outcomes)} of {number} answers"
        time.sleep(0.02)
