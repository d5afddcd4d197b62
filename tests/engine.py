"""A local engine in a test: run with members, asked, and held to the plain generator."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from serve.contracts import GenerateRequest, TokenChunk
from serve.engines.local.engine import Config, LocalEngine

TIE = 1e-3  # greedy comparisons end, counted, where the top two logits are closer than this (blueprint.md)


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


def equal_up_to_ties(model: Any, prompt: Sequence[int], ours: Sequence[int], oracle: Sequence[int]) -> int:
    """Asserts equal tokens up to the first tie; returns how many were compared."""
    for at, (one, other) in enumerate(zip(ours, oracle, strict=False)):
        if one != other:
            with torch.no_grad():
                logits_V = model(torch.tensor([[*prompt, *oracle[:at]]]))[0, -1]
            first, second = logits_V.topk(2).values.tolist()
            assert first - second < TIE, f"token {at}: {one} is not {other}, and the margin is {first - second}"
            return at
    assert len(ours) == len(oracle)
    return len(ours)
