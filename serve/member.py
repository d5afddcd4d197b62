"""Engines in Ray Serve replicas, and how the gateway reaches them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeVar

import numpy as np
from ray import serve as ray_serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from serve.api.spent import Record
from serve.contracts import SECONDS_A_TOKEN, Engine, GenerateRequest, MemberInfo, TokenChunk
from serve.metrics import recorder
from serve.resume import SoFar
from ulm import registry
from ulm.errors import MemberDownError, OverloadedError, RequestError, UnsupportedError
from ulm.recipes.serve import PATIENCE_S

T = TypeVar("T")
STATS_PERIOD_S = 5.0
HEALTH_PERIOD_S = 2.0  # three failures in a row, and Serve replaces a replica
DRAIN_LOOP_S = 0.2  # how often a replica that ends looks whether it has anything left to do
MAX_OPEN = 2_000  # calls that an engine's replica takes; engines refuse by themselves before, those of the echo never
MAX_QUEUED = 1_000  # calls of one gateway that wait for a replica that takes them
LOAD_S = 600.0  # more, for weights to be read
CANCEL_S = 0.1  # from the cancelling of a request's calls to its own, across threads
# What an engine's stats are called among the metrics; one that has no such number leaves it out.
GAUGES: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("resident_bytes", "ulm_memory_resident_bytes", {}),
    ("gpu_bytes", "ulm_memory_gpu_bytes", {}),
    ("running", "ulm_engine_answers", {"state": "running"}),
    ("waiting", "ulm_engine_answers", {"state": "waiting"}),
    ("weight_bytes", "ulm_engine_weight_bytes", {}),
    ("kv_cache_used_bytes", "ulm_engine_kv_cache_bytes", {"kind": "used"}),
    ("kv_cache_bytes", "ulm_engine_kv_cache_bytes", {"kind": "total"}),
)
COUNTERS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("preemptions", "ulm_engine_preemptions_total", {}),
    ("prompt_tokens", "ulm_engine_prompt_tokens_total", {"kind": "all"}),
    ("shared_prompt_tokens", "ulm_engine_prompt_tokens_total", {"kind": "shared"}),
)


class EngineHost:
    """An engine in this process: made at once, its members loaded when first asked, its memory reported since."""

    def __init__(self, config: dict[str, Any], checkpoints: dict[str, str], role: str) -> None:
        configured = registry.configure("engine", config)
        self.engine: Engine = registry.find("engine", configured.kind)(configured)
        self._checkpoints, self._role = checkpoints, role
        self._reporting: asyncio.Task[None] | None = None
        self._loading = asyncio.Lock()

    async def check(self) -> None:
        """Returns once every member is loaded, and from then on while the engine works; else raises why it does not.

        Serve calls a replica ready when its health check returns, and replaces one whose check fails.
        """
        async with self._loading:
            if self._reporting is None:
                for member, checkpoint in self._checkpoints.items():
                    await self.engine.load(member, checkpoint)
                self._reporting = asyncio.create_task(report(self.engine, self._role))
        await self.engine.stats()
        if self._reporting.done():
            self._reporting.result()


async def report(engine: Engine, role: str) -> None:
    """An engine's numbers as metrics, every few seconds for ever."""
    record, counted = recorder(), dict[str, float]()
    while True:
        stats = await engine.stats()
        for name, metric, tags in GAUGES:
            if name in stats:
                record(metric, stats[name], {"role": role, **tags})
        for name, metric, tags in COUNTERS:
            if name in stats:
                record(metric, stats[name] - counted.get(name, 0.0), {"role": role, **tags})
                counted[name] = stats[name]
        await asyncio.sleep(STATS_PERIOD_S)


class EngineCalls:
    """What a RemoteEngine calls of a replica: an engine's methods, each as one message or as a stream."""

    _engine: Engine

    async def members(self) -> dict[str, MemberInfo]:
        """What is loaded now."""
        return await self._engine.members()

    async def generate(self, request: GenerateRequest) -> AsyncIterator[TokenChunk]:
        """Chunks as they come."""
        async with aclosing(self._engine.generate(request)) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                yield chunk

    async def generate_whole(self, request: GenerateRequest) -> list[TokenChunk]:
        """All chunks as one a choice: a single message where the client does not stream."""
        return TokenChunk.by_choice([chunk async for chunk in self._engine.generate(request)])

    async def score(self, member: str, tokens: Sequence[int]) -> list[float]:
        """See Engine."""
        return await self._engine.score(member, tokens)

    async def next_logprobs(self, member: str, tokens: Sequence[int]) -> np.ndarray:
        """See Engine."""
        return await self._engine.next_logprobs(member, tokens)

    async def embed(self, member: str, tokens: Sequence[int]) -> np.ndarray:
        """See Engine."""
        return await self._engine.embed(member, tokens)

    async def load(self, member: str, checkpoint: str) -> MemberInfo:
        """See Engine."""
        return await self._engine.load(member, checkpoint)

    async def unload(self, member: str) -> None:
        """See Engine."""
        await self._engine.unload(member)

    async def reload(self, member: str, checkpoint: str) -> MemberInfo:
        """See Engine."""
        return await self._engine.reload(member, checkpoint)

    async def stats(self) -> dict[str, float]:
        """See Engine."""
        return await self._engine.stats()


@ray_serve.deployment(
    max_ongoing_requests=MAX_OPEN,
    max_queued_requests=MAX_QUEUED,
    health_check_period_s=HEALTH_PERIOD_S,
    graceful_shutdown_wait_loop_s=DRAIN_LOOP_S,
    max_surge_percent=100,
)
class EngineReplica(EngineCalls):
    """One engine and its members. The engine queues by itself, so Serve lets everything through."""

    def __init__(self, config: dict[str, Any], checkpoints: dict[str, str]) -> None:
        self._host = EngineHost(config, checkpoints, "engine")
        self._engine = self._host.engine

    async def check_health(self) -> None:
        """Loads the members at the first call."""
        await self._host.check()


class RemoteEngine:
    """An engine in other processes, as an Engine. Errors come back as they were raised there.

    A call whose replica dies goes to another one, up to `retries` times in a row; an answer that has begun goes on
    there from its last token. MemberDownError where nobody is left to ask, or nobody answers in `patience_s`. Whoever
    stops waiting for a call cancels it there, too.
    """

    def __init__(
        self, handle: DeploymentHandle, patience_s: float = PATIENCE_S, retries: int = 0, record: Record | None = None
    ) -> None:
        self._handle, self._patience_s, self._retries, self._record = handle, patience_s, retries, record

    async def _call(self, method: str, *arguments: Any, of: Iterable[str] = (), more_s: float = 0.0) -> Any:
        """What one of the replicas answers; `of` are the members that are asked."""
        return await self._retried(lambda: self._asked(method, *arguments), of, self._patience_s + more_s)

    async def _retried(self, ask: Callable[[], Awaitable[T]], of: Iterable[str], patience_s: float) -> T:
        try:
            async with asyncio.timeout(patience_s) as limit:
                for _ in range(self._retries):
                    try:
                        return await ask()
                    except MemberDownError:
                        self._count_retry(of)
                return await ask()
        except TimeoutError:
            if not limit.expired():  # the engine's own
                raise
            raise MemberDownError(f"{self._name} did not answer within {patience_s:.0f} s") from None

    async def _asked(self, method: str, *arguments: Any) -> Any:
        response, is_done = getattr(self._handle, method).remote(*arguments), False
        try:
            async with self._errors():
                result = await response
                is_done = True
                return result
        finally:
            if not is_done:
                response.cancel()

    def _count_retry(self, of: Iterable[str]) -> None:
        if self._record is not None:
            for member in of:
                self._record("ulm_retries_total", 1, {"member": member})

    @property
    def _name(self) -> str:
        return str(self._handle.deployment_name)

    @asynccontextmanager
    async def _errors(self) -> AsyncIterator[None]:
        """Errors of the engine as it raised them, those of what lies between as MemberDownError."""
        try:
            yield
        except RayTaskError as error:
            if isinstance(error.cause, (RayError, RayServeException)):  # of a call that the engine's process made
                raise MemberDownError(f"{self._name} is not there: {_line(error.cause)}") from None
            raise error.cause from None
        except BackPressureError:
            raise OverloadedError(f"{self._name}: too many requests wait for it", code="overloaded") from None
        except (RayError, RayServeException) as error:
            raise MemberDownError(f"{self._name} is not there: {_line(error)}") from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise  # whoever waited has left
            # Serve cancels the calls of a replica that goes away, and those of a request whose client has left: then
            # this task, too, is cancelled in a moment.
            await asyncio.sleep(CANCEL_S)
            raise MemberDownError(f"{self._name} is not there: its calls were cancelled") from None

    async def generate(self, request: GenerateRequest) -> AsyncIterator[TokenChunk]:
        """Chunks of an answer; one a choice when the request does not stream."""
        so_far = SoFar(request)
        if not request.stream:
            patience_s = self._patience_s + SECONDS_A_TOKEN * request.max_tokens
            for chunk in await self._retried(
                lambda: self._asked("generate_whole", so_far.rest()), request.weights, patience_s
            ):
                yield chunk
            return
        retries, down = self._retries, None
        while not so_far.is_complete:
            try:
                async with aclosing(self._stream(so_far.rest())) as chunks:
                    async for chunk in chunks:
                        retries = self._retries
                        so_far.add(chunk)
                        yield chunk
                return
            except MemberDownError as error:
                if so_far.is_complete:  # the replica had nothing more to do
                    return
                if not (retries and so_far.can_go_on):
                    raise
                retries, down = retries - 1, error
                self._count_retry(request.weights)
            except (RequestError, UnsupportedError) as error:
                if down is None or isinstance(error, OverloadedError):
                    raise
                raise down from None  # vllm refuses to go on with some answers, and that is not the request's fault

    async def _stream(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        """Chunks from one replica."""
        response = self._handle.options(stream=True).generate.remote(request)
        try:
            while True:
                async with self._errors():
                    try:
                        chunk = await anext(response)
                    except StopAsyncIteration:
                        return
                yield chunk
        finally:
            response.cancel()  # frees the rows when the client has left; nothing to do after the end

    async def members(self) -> dict[str, MemberInfo]:
        """What is loaded now."""
        members: dict[str, MemberInfo] = await self._call("members")
        return members

    async def load(self, member: str, checkpoint: str) -> MemberInfo:
        """See Engine."""
        info: MemberInfo = await self._call("load", member, checkpoint, more_s=LOAD_S)
        return info

    async def unload(self, member: str) -> None:
        """See Engine."""
        await self._call("unload", member)

    async def reload(self, member: str, checkpoint: str) -> MemberInfo:
        """See Engine."""
        info: MemberInfo = await self._call("reload", member, checkpoint, more_s=LOAD_S)
        return info

    async def score(self, member: str, tokens: Sequence[int]) -> list[float]:
        """See Engine."""
        scores: list[float] = await self._call("score", member, tokens, of=(member,))
        return scores

    async def next_logprobs(self, member: str, tokens: Sequence[int]) -> np.ndarray:
        """See Engine."""
        return np.asarray(await self._call("next_logprobs", member, tokens, of=(member,)))

    async def embed(self, member: str, tokens: Sequence[int]) -> np.ndarray:
        """See Engine."""
        return np.asarray(await self._call("embed", member, tokens, of=(member,)))

    async def stats(self) -> dict[str, float]:
        """See Engine."""
        stats: dict[str, float] = await self._call("stats")
        return stats

    async def close(self) -> None:
        """Nothing: the replica ends with the application."""


def _line(error: BaseException) -> str:
    """The first line of what Ray says, which goes on with addresses and logs."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
