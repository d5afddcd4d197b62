"""Engines in Ray Serve replicas, and how the gateway reaches them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from ray import serve as ray_serve
from ray.exceptions import RayTaskError
from ray.serve.handle import DeploymentHandle

from serve.contracts import Engine, GenerateRequest, MemberInfo, TokenChunk
from serve.metrics import recorder
from ulm import registry

STATS_PERIOD_S = 5.0


@ray_serve.deployment(max_ongoing_requests=1_000, health_check_period_s=10)
class EngineReplica:
    """One engine and its members. The engine queues by itself, so Serve lets everything through."""

    def __init__(self, config: dict[str, Any], checkpoints: dict[str, str]) -> None:
        configured = registry.configure("engine", config)
        self._engine: Engine = registry.find("engine", configured.kind)(configured)
        self._checkpoints = checkpoints
        self._record = recorder()
        self._reporting: asyncio.Task[None] | None = None
        self._loading = asyncio.Lock()

    async def check_health(self) -> None:
        """Loads the members at the first call; Serve calls a replica ready once this returns."""
        async with self._loading:
            loaded = await self._engine.members()
            for member, checkpoint in self._checkpoints.items():
                if member not in loaded:
                    await self._engine.load(member, checkpoint)
            if self._reporting is None:
                self._reporting = asyncio.create_task(self._report())

    async def _report(self) -> None:
        while True:
            stats = await self._engine.stats()
            self._record("ulm_memory_resident_bytes", stats["resident_bytes"], {"role": "engine"})
            self._record("ulm_memory_gpu_bytes", stats["gpu_bytes"], {"role": "engine"})
            await asyncio.sleep(STATS_PERIOD_S)

    async def members(self) -> dict[str, MemberInfo]:
        """What is loaded now."""
        return await self._engine.members()

    async def generate(self, request: GenerateRequest) -> AsyncIterator[TokenChunk]:
        """Chunks as they come."""
        async for chunk in self._engine.generate(request):
            yield chunk

    async def generate_whole(self, request: GenerateRequest) -> TokenChunk:
        """All chunks as one: a single message where the client does not stream."""
        return joined([chunk async for chunk in self._engine.generate(request)])

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
        self._checkpoints.pop(member, None)
        await self._engine.unload(member)

    async def reload(self, member: str, checkpoint: str) -> MemberInfo:
        """See Engine."""
        return await self._engine.reload(member, checkpoint)

    async def stats(self) -> dict[str, float]:
        """See Engine."""
        return await self._engine.stats()


def joined(chunks: Sequence[TokenChunk]) -> TokenChunk:
    """Several chunks of one answer as one."""
    return replace(
        chunks[-1],
        text="".join(chunk.text for chunk in chunks),
        tokens=tuple(token for chunk in chunks for token in chunk.tokens),
        logprobs=tuple(entry for chunk in chunks for entry in chunk.logprobs),
    )


class RemoteEngine:
    """An engine in another process, as an Engine. Errors come back as they were raised there."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def _call(self, method: str, *arguments: Any) -> Any:
        try:
            return await getattr(self._handle, method).remote(*arguments)
        except RayTaskError as error:
            raise error.cause from None

    async def generate(self, request: GenerateRequest) -> AsyncIterator[TokenChunk]:
        """Chunks of an answer; one when the request does not stream."""
        if not request.stream:
            yield await self._call("generate_whole", request)
            return
        response = self._handle.options(stream=True).generate.remote(request)
        try:
            async for chunk in response:
                yield chunk
        except RayTaskError as error:
            raise error.cause from None
        finally:
            response.cancel()  # frees the rows when the client has left; nothing to do after the end

    async def members(self) -> dict[str, MemberInfo]:
        """What is loaded now."""
        members: dict[str, MemberInfo] = await self._call("members")
        return members

    async def load(self, member: str, checkpoint: str) -> MemberInfo:
        """See Engine."""
        info: MemberInfo = await self._call("load", member, checkpoint)
        return info

    async def unload(self, member: str) -> None:
        """See Engine."""
        await self._call("unload", member)

    async def reload(self, member: str, checkpoint: str) -> MemberInfo:
        """See Engine."""
        info: MemberInfo = await self._call("reload", member, checkpoint)
        return info

    async def score(self, member: str, tokens: Sequence[int]) -> list[float]:
        """See Engine."""
        scores: list[float] = await self._call("score", member, tokens)
        return scores

    async def next_logprobs(self, member: str, tokens: Sequence[int]) -> np.ndarray:
        """See Engine."""
        return np.asarray(await self._call("next_logprobs", member, tokens))

    async def embed(self, member: str, tokens: Sequence[int]) -> np.ndarray:
        """See Engine."""
        return np.asarray(await self._call("embed", member, tokens))

    async def stats(self) -> dict[str, float]:
        """See Engine."""
        stats: dict[str, float] = await self._call("stats")
        return stats

    async def close(self) -> None:
        """Nothing: the replica ends with the application."""
