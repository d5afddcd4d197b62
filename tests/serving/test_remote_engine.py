"""What the gateway makes of an engine in another process: its errors, its silence, its end. Without a cluster."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from ray import exceptions as ray_exceptions
from ray.serve import exceptions as serve_exceptions

from serve.contracts import GenerateRequest, TokenChunk
from serve.member import RemoteEngine
from ulm.errors import MemberDownError, ModelNotFoundError, OverloadedError, RequestError

ASKED = GenerateRequest((1, 2, 3), {"a": 1.0}, 4)
CHUNKS = [TokenChunk("a", (97,)), TokenChunk("b", (98,), finish_reason="length")]


class Response:
    """A reply of Serve's: to be awaited or iterated, and cancelled."""

    def __init__(self, outcome: Any, delay_s: float) -> None:
        self._outcome, self._delay_s, self.is_cancelled = outcome, delay_s, False
        self._chunks: list[Any] = [*CHUNKS[:1], *([outcome] if isinstance(outcome, BaseException) else CHUNKS[1:])]

    def cancel(self) -> None:
        self.is_cancelled = True

    def __await__(self) -> Any:
        return self._wait(self._outcome).__await__()

    async def _wait(self, outcome: Any) -> Any:
        await asyncio.sleep(self._delay_s)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def __aiter__(self) -> AsyncIterator[Any]:
        return self  # type: ignore[return-value]

    async def __anext__(self) -> Any:
        if not self._chunks:
            raise StopAsyncIteration
        return await self._wait(self._chunks.pop(0))


@dataclass
class Handle:
    """A handle of Serve's whose every call has one outcome."""

    outcome: Any
    delay_s: float = 0.0
    deployment_name: str = "engine-1"
    made: list[Response] = field(default_factory=list)

    def options(self, stream: bool) -> Handle:
        return self

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_"):
            raise AttributeError(method)
        return self

    def remote(self, *arguments: Any) -> Response:
        self.made.append(Response(self.outcome, self.delay_s))
        return self.made[-1]


async def streamed(engine: RemoteEngine) -> list[TokenChunk]:
    return [chunk async for chunk in engine.generate(ASKED)]


def raised(error: Exception) -> ray_exceptions.RayTaskError:
    """An error as Ray brings it from another process."""
    return ray_exceptions.RayTaskError("generate", "", error, proctitle="", pid=1, ip="127.0.0.1")


GONE = [
    ray_exceptions.ActorDiedError(),
    ray_exceptions.ActorUnavailableError("The actor is restarting", None),
    ray_exceptions.WorkerCrashedError(),
    ray_exceptions.ObjectLostError("00" * 28, None, ""),
    ray_exceptions.TaskCancelledError(),
    serve_exceptions.RequestCancelledError("r1"),
    serve_exceptions.ReplicaUnavailableError("engine-1#x"),
    serve_exceptions.BackPressureError(9, 8),
    asyncio.CancelledError(),
    raised(ray_exceptions.ActorDiedError()),
]


@pytest.mark.parametrize("error", GONE, ids=lambda error: type(error).__name__)
def test_whatever_ray_says_of_a_process_that_is_gone_is_a_member_down(error: BaseException) -> None:
    async def body() -> None:
        engine = RemoteEngine(Handle(error))  # type: ignore[arg-type]
        for call in (streamed(engine), engine.score("a", (1, 2)), engine.next_logprobs("a", (1, 2)), engine.stats()):
            with pytest.raises(MemberDownError, match="^engine-1 is not there: .") as caught:
                await call
            assert "\n" not in str(caught.value)

    asyncio.run(body())


@pytest.mark.parametrize("error", [RequestError("no", param="n"), ModelNotFoundError("x"), OverloadedError("busy")])
def test_errors_of_the_engine_itself_come_back_as_they_were_raised(error: Exception) -> None:
    async def body() -> None:
        engine = RemoteEngine(Handle(raised(error)))  # type: ignore[arg-type]
        for call in (streamed(engine), engine.score("a", (1, 2))):
            with pytest.raises(type(error)) as caught:
                await call
            assert caught.value is error

    asyncio.run(body())


def test_an_engine_that_says_nothing_is_not_waited_for_for_ever_and_its_call_is_cancelled() -> None:
    async def body() -> None:
        handle = Handle([0.0], delay_s=60)
        engine = RemoteEngine(handle, patience_s=0.05)  # type: ignore[arg-type]
        with pytest.raises(MemberDownError, match="engine-1 did not answer within 0 s"):
            await engine.score("a", (1, 2))
        assert [response.is_cancelled for response in handle.made] == [True]

    asyncio.run(body())


def test_who_stops_waiting_cancels_the_call_there_and_is_told_nothing_else() -> None:
    async def body() -> None:
        handle = Handle([0.0], delay_s=60)
        engine = RemoteEngine(handle)  # type: ignore[arg-type]
        tasks = [asyncio.create_task(call) for call in (engine.score("a", (1, 2)), streamed(engine))]
        await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        assert [type(e) for e in await asyncio.gather(*tasks, return_exceptions=True)] == [asyncio.CancelledError] * 2
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await engine.stats()
        assert [response.is_cancelled for response in handle.made] == [True] * 3

    asyncio.run(body())


def test_a_request_that_is_cancelled_call_first_is_cancelled_and_no_member_is_down() -> None:
    """Serve cancels a request's calls in one thread and the request in another: either may come first."""

    async def body() -> None:
        handle = Handle(asyncio.CancelledError(), delay_s=0.01)
        task = asyncio.create_task(RemoteEngine(handle).stats())  # type: ignore[arg-type]
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(body())


def test_an_answer_comes_as_it_was_given_and_its_call_is_closed() -> None:
    async def body() -> None:
        handle = Handle(CHUNKS)
        engine = RemoteEngine(handle)  # type: ignore[arg-type]
        assert await streamed(engine) == CHUNKS
        assert [response.is_cancelled for response in handle.made] == [True], "without effect behind the end"
        leaving = engine.generate(ASKED)
        assert await anext(leaving) == CHUNKS[0]
        await leaving.aclose()  # type: ignore[attr-defined]
        assert handle.made[-1].is_cancelled
        assert await engine.score("a", (1, 2)) == CHUNKS
        assert not handle.made[-1].is_cancelled

    asyncio.run(body())
