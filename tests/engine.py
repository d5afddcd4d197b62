"""A local engine in a test: run with members, and asked."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from serve.contracts import GenerateRequest, TokenChunk
from serve.engines.local.engine import Config, LocalEngine


def with_engine(members: dict[str, Path], body: Callable[[LocalEngine], Awaitable[Any]], **settings: Any) -> Any:
    """What a test's async body gives, with a local engine that has these members loaded."""

    async def run() -> Any:
        engine = LocalEngine(Config(kind="local", device="cpu", threads=1, **{"compile_after_steps": None, **settings}))
        try:
            for member, checkpoint in members.items():
                await engine.load(member, str(checkpoint))
            return await body(engine)
        finally:
            await engine.close()

    return asyncio.run(run())


async def answers(engine: LocalEngine, request: GenerateRequest) -> list[TokenChunk]:
    """All choices of an answer, each as one chunk, in order."""
    chunks = [chunk async for chunk in engine.generate(request)]
    return sorted(TokenChunk.by_choice(chunks), key=lambda chunk: chunk.index)


async def answer(engine: LocalEngine, request: GenerateRequest) -> TokenChunk:
    """An answer of one choice, as one chunk."""
    return TokenChunk.joined([chunk async for chunk in engine.generate(request)])
