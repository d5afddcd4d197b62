"""Members whose every delay and failure is chosen, on an event loop whose clock jumps: strategies without models."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np

from serve.contracts import GenerateRequest, Member, TokenChunk, TokenLogprob
from ulm.errors import MemberDownError, OverloadedError
from ulm.models.text_stream import TextStream
from ulm.swarm.embed import Embedder
from ulm.swarm.router import Router
from ulm.tokenizers.byte import byte_tokenizer
from ulm.tokenizers.tokenizer import Tokenizer

T = TypeVar("T")
Way = Literal["well", "dies", "hangs", "too much", "wrong shape", "no end", "overloaded", "no number", "no token"]
LIKELY = -0.01  # log-probability of the token that a member would choose
WORDS = ("alpha", "bravo", "charlie", "delta")  # what the experts of `router` know, one each


class _Selector(selectors.DefaultSelector):  # type: ignore[misc,valid-type]
    """Waits for nothing but other threads: the clock is moved to the next timer instead."""

    loop: Any = None

    def select(self, timeout: float | None = None) -> Any:
        found = super().select(0)
        if not found and timeout is None:
            raise RuntimeError("everybody waits, and nothing will ever happen")
        if not found and timeout:
            self.loop.now_s += timeout
        return found


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop in which sleeping takes no time."""

    def __init__(self) -> None:
        self.now_s = 100.0
        selector = _Selector()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self.now_s


def run(body: Callable[[], Awaitable[T]]) -> T:
    """What an async function returns on a virtual clock."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(body())  # type: ignore[arg-type]


TOKENIZER = byte_tokenizer()


def following(tokens: Sequence[int]) -> int:
    """The token that every member says next: a letter that depends on the text and its length."""
    return TOKENIZER.encode("abcdefgh"[(sum(tokens) + len(tokens)) % 8])[0]


@dataclass
class VirtualEngine:
    """Members that say what `following` says, one token every `delay_s`, until they fail after `fails_after` tokens."""

    delay_s: float = 0.01
    way: Way = "well"
    fails_after: int = 0
    heeds_deadlines: bool = True
    open_calls: int = 0  # under way now
    asked: list[tuple[str, str]] = field(default_factory=list)  # what was asked of whom
    said: int = 0  # tokens that members have generated, and looks at what comes next
    generated: int = 0  # of these the tokens of answers

    async def _step(self) -> None:
        await asyncio.sleep(self.delay_s)
        if self.said >= self.fails_after and self.way == "hangs":
            await asyncio.sleep(1e9)
        if self.said >= self.fails_after and self.way == "dies":
            raise MemberDownError("its process is gone")
        if self.said >= self.fails_after and self.way == "overloaded":
            raise OverloadedError("too many are waiting", code="overloaded")

    async def generate(self, request: GenerateRequest) -> AsyncIterator[TokenChunk]:
        request.check()
        self.asked += [(member, "generate") for member in request.weights]
        self.open_calls += 1
        tokens, held, new = [*request.tokens, *request.generated], [], 0
        stream, started_s = TextStream(TOKENIZER, request.stop), asyncio.get_running_loop().time()
        for token in request.generated:
            stream.push(token)
        try:
            extra = 2 if self.way == "too much" else 0
            while new < request.max_tokens + extra * (self.said >= self.fails_after):
                await self._step()
                if self.way == "no end" and self.said >= self.fails_after:
                    return
                token = following(tokens)
                tokens.append(token)
                stream.push(token)
                is_wrong = self.said >= self.fails_after
                new, self.said = new + 1, self.said + len(request.weights)
                self.generated += len(request.weights)
                likely = np.nan if is_wrong and self.way == "no number" else LIKELY
                entry = () if request.num_top_logprobs is None else (TokenLogprob(token, likely),)
                if is_wrong and self.way == "no token":
                    token = TOKENIZER.vocab_size
                late = asyncio.get_running_loop().time() - started_s >= (request.deadline_s or 1e12)
                ends = "stop" if stream.stopped else "length" if late and self.heeds_deadlines else None
                chunk = TokenChunk(
                    "", (token,), entry, ends, degraded="ended by its deadline" if late and ends else None
                )
                if request.stream:
                    yield chunk
                else:
                    held.append(chunk)
                if ends:
                    break
            else:
                held.append(TokenChunk("", (), finish_reason="length"))
            if held:
                yield TokenChunk.joined(held)
        finally:
            self.open_calls -= 1

    async def next_logprobs(self, member: str, tokens: Sequence[int]) -> np.ndarray:
        self.asked.append((member, "next_logprobs"))
        self.open_calls += 1
        try:
            await self._step()
            self.said += 1
            size = TOKENIZER.vocab_size
            if self.way == "wrong shape":
                size += 1
            if self.way == "no number":
                return np.full(size, np.nan, dtype=np.float32)
            row = np.full(size, np.log((1 - np.exp(LIKELY)) / (size - 1)), dtype=np.float32)
            row[following(tokens)] = LIKELY
            return row
        finally:
            self.open_calls -= 1

    async def score(self, member: str, tokens: Sequence[int]) -> list[float]:
        self.asked.append((member, "score"))
        self.open_calls += 1
        try:
            await self._step()
            likely = np.nan if self.way == "no number" else LIKELY * (1 + int(member[1:]))
            return [likely for _ in tokens[self.way != "wrong shape" :]]
        finally:
            self.open_calls -= 1


def member(name: str, engine: Any, tokenizer: Tokenizer = TOKENIZER, context_tokens: int = 4_096) -> Member:
    """A member of an engine."""
    return Member(name, engine, tokenizer, context_tokens)


def router(number: int, temperature: float = 0.5) -> Router:
    """A router of experts e0, e1, …, each of which knows one of WORDS."""
    one_each = np.eye(len(WORDS), dtype=np.float32)
    embedder = Embedder({word: row for row, word in enumerate(WORDS)}, np.ones(len(WORDS)), one_each)
    return Router(
        [f"e{n}" for n in range(number)], embedder, one_each[:number], np.full(number, 1 / number), temperature
    )


def open_calls(members: Mapping[str, Member]) -> int:
    """Calls that are under way at all engines."""
    return sum(engine.open_calls for engine in {id(m.engine): m.engine for m in members.values()}.values())
