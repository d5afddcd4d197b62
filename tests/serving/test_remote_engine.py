"""What the gateway makes of an engine in another process: its errors, its silence, its end. Without a cluster."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from ray import exceptions as ray_exceptions
from ray.serve import exceptions as serve_exceptions

from serve.contracts import GenerateRequest, TokenChunk
from serve.member import RemoteEngine
from ulm.errors import MemberDownError, ModelNotFoundError, OverloadedError, RequestError
from ulm.models.sampling import Sampling

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
        return self

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
    asyncio.CancelledError(),
    raised(ray_exceptions.ActorDiedError()),
]


@pytest.mark.parametrize("error", GONE, ids=lambda error: type(error).__name__)
def test_whatever_ray_says_of_a_process_that_is_gone_is_a_member_down(error: BaseException) -> None:
    async def body() -> None:
        engine = RemoteEngine(Handle(error))
        for call in (streamed(engine), engine.score("a", (1, 2)), engine.next_logprobs("a", (1, 2)), engine.stats()):
            with pytest.raises(MemberDownError, match="^engine-1 is not there: .") as caught:
                await call
            assert "\n" not in str(caught.value)

    asyncio.run(body())


@pytest.mark.parametrize("error", [RequestError("no", param="n"), ModelNotFoundError("x"), OverloadedError("busy")])
def test_errors_of_the_engine_itself_come_back_as_they_were_raised(error: Exception) -> None:
    async def body() -> None:
        engine = RemoteEngine(Handle(raised(error)))
        for call in (streamed(engine), engine.score("a", (1, 2))):
            with pytest.raises(type(error)) as caught:
                await call
            assert caught.value is error

    asyncio.run(body())


def test_an_engine_that_says_nothing_is_not_waited_for_for_ever_and_its_call_is_cancelled() -> None:
    async def body() -> None:
        handle = Handle([0.0], delay_s=60)
        engine = RemoteEngine(handle, patience_s=0.05)
        with pytest.raises(MemberDownError, match="engine-1 did not answer within 0 s"):
            await engine.score("a", (1, 2))
        assert [response.is_cancelled for response in handle.made] == [True]

    asyncio.run(body())


def test_who_stops_waiting_cancels_the_call_there_and_is_told_nothing_else() -> None:
    async def body() -> None:
        handle = Handle([0.0], delay_s=60)
        engine = RemoteEngine(handle)
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
        task = asyncio.create_task(RemoteEngine(handle).stats())
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(body())


def test_an_answer_comes_as_it_was_given_and_its_call_is_closed() -> None:
    async def body() -> None:
        handle = Handle(CHUNKS)
        engine = RemoteEngine(handle)
        assert await streamed(engine) == CHUNKS
        assert [response.is_cancelled for response in handle.made] == [True], "without effect behind the end"
        leaving = engine.generate(ASKED)
        assert await anext(leaving) == CHUNKS[0]
        await leaving.aclose()  # type: ignore[attr-defined]
        assert handle.made[-1].is_cancelled
        assert await engine.score("a", (1, 2)) == CHUNKS
        assert not handle.made[-1].is_cancelled

    asyncio.run(body())


def test_what_waits_for_a_replica_is_bounded_and_beyond_it_the_engine_is_overloaded_not_gone() -> None:
    async def body() -> None:
        engine = RemoteEngine(Handle(serve_exceptions.BackPressureError(9, 8)), retries=2)
        for call in (streamed(engine), engine.score("a", (1, 2))):
            with pytest.raises(OverloadedError, match="engine-1: too many requests wait for it"):
                await call

    asyncio.run(body())


# ---- several replicas


class Replicas:
    """A handle whose calls are answered by replicas in turn, each of which dies after some of the answer's tokens."""

    deployment_name = "engine-1"

    def __init__(self, *lives: int, delay_s: float = 0.0) -> None:
        self._lives, self._delay_s, self.requests = list(lives), delay_s, list[GenerateRequest]()

    def options(self, stream: bool) -> Replicas:
        return self

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_"):
            raise AttributeError(method)
        return self

    def remote(self, *arguments: Any) -> Response:
        lives = self._lives.pop(0)
        if not isinstance(arguments[0], GenerateRequest):  # a score
            return Response(ray_exceptions.ActorDiedError() if lives < 1_000 else [0.5], self._delay_s)
        request = arguments[0]
        self.requests.append(request)
        first = len(request.generated)
        tokens = range(first, first + request.max_tokens)
        chunks: list[Any] = [TokenChunk(f"{token} ", (token,)) for token in tokens[:lives]]
        whole = lives >= request.max_tokens
        chunks.append(TokenChunk("", (), finish_reason="length") if whole else ray_exceptions.ActorDiedError())
        response = Response(TokenChunk.by_choice(chunks) if whole else chunks[-1], self._delay_s)
        response._chunks = chunks
        return response


@pytest.mark.parametrize("lives", [(0, 6), (2, 6), (2, 3, 6), (0, 0, 6), (5, 6), (6,), (1, 0, 1, 0, 6)], ids=str)
def test_a_stream_whose_replicas_die_goes_on_at_others_token_for_token(lives: tuple[int, ...]) -> None:
    counted: list[tuple[str, float, Any]] = []

    async def body() -> None:
        handle = Replicas(*lives)
        engine = RemoteEngine(handle, retries=2, record=lambda *count: counted.append(count))
        asked = replace(ASKED, max_tokens=6, weights={"a": 0.5, "b": 0.5})
        found = [chunk async for chunk in engine.generate(asked)]
        assert "".join(chunk.text for chunk in found) == "0 1 2 3 4 5 " and found[-1].finish_reason == "length"
        assert all(len(r.generated) + r.max_tokens == 6 for r in handle.requests)
        for request in handle.requests:
            request.check()

    asyncio.run(body())
    assert counted == (len(lives) - 1) * [("ulm_retries_total", 1, {"member": m}) for m in "ab"]


def test_as_many_deaths_in_a_row_as_there_are_replicas_are_the_members_own() -> None:
    async def body() -> None:
        for lives in ((0, 0, 0), (3, 0, 0, 0)):
            engine = RemoteEngine(Replicas(*lives), retries=2)
            with pytest.raises(MemberDownError, match="engine-1 is not there"):
                async for _ in engine.generate(replace(ASKED, max_tokens=6)):
                    pass
        with pytest.raises(MemberDownError, match="engine-1 is not there"):
            await RemoteEngine(Replicas(0, 0, 0), retries=2).score("a", (1, 2))

    asyncio.run(body())


def test_whole_answers_and_scores_are_asked_for_again_in_the_time_that_is_left() -> None:
    async def body() -> None:
        handle = Replicas(0, 2, 4, delay_s=0.05)
        engine = RemoteEngine(handle, retries=2)
        asked = replace(ASKED, stream=False, deadline_s=0.2)
        assert "".join([chunk.text async for chunk in engine.generate(asked)]) == "0 1 2 3 "
        left_s = [request.deadline_s for request in handle.requests]
        assert left_s[0] == pytest.approx(0.2, abs=0.01) and left_s == sorted(left_s, reverse=True)  # type: ignore[type-var]
        assert left_s[2] is not None and left_s[2] <= 0.11
        assert await RemoteEngine(Replicas(0, 1_000), retries=1).score("a", (1, 2)) == [0.5]
        slow = RemoteEngine(Replicas(0, 0, 0, delay_s=0.06), patience_s=0.1, retries=2)
        with pytest.raises(MemberDownError, match="did not answer within"):
            await slow.score("a", (1, 2))

    asyncio.run(body())


def test_an_answer_of_several_choices_that_has_begun_cannot_go_on_elsewhere() -> None:
    async def body() -> None:
        engine = RemoteEngine(Replicas(2, 6), retries=2)
        with pytest.raises(MemberDownError):
            async for _ in engine.generate(replace(ASKED, max_tokens=6, n=2, sampling=Sampling(temperature=1.0))):
                pass

    asyncio.run(body())


def test_a_replica_that_cannot_go_on_with_an_answer_leaves_it_to_other_members_and_blames_no_client() -> None:
    class Unable(Replicas):
        """Its second replica does not go on with what another began, as vLLM with penalties."""

        def remote(self, *arguments: Any) -> Response:
            response = super().remote(*arguments)
            if arguments[0].generated:
                response._chunks = [raised(RequestError("presence_penalty: not for an answer that goes on"))]
            return response

    async def body() -> None:
        engine = RemoteEngine(Unable(2, 6), retries=2)
        with pytest.raises(MemberDownError, match="engine-1 is not there"):
            async for _ in engine.generate(replace(ASKED, max_tokens=6)):
                pass

    asyncio.run(body())
