"""What a strategy and the gateway cost, with members that cost nothing: engines of kind `echo`."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np

import ulm
from serve.contracts import GenerateRequest, Ledger, Member, SwarmContext, TokenChunk
from ulm import registry
from ulm.recipes.serve import Budget, ServeRecipe
from ulm.swarm.embed import Embedder
from ulm.swarm.router import Router
from ulm.tokenizers.byte import byte_tokenizer

NUM_MEMBERS = 8
ANSWER_TOKENS, ANSWERS, WARM_UP = 64, 200, 20
WORDS = ("court", "def", "patient", "train", "river", "planet", "bread", "music")  # one for each expert's cluster
PROMPT = "The court heard the case and said"
MEMBERS, MOST_REPLICAS = (2, 4, 8, 16, 32, 64), 4
CLIENTS, SECONDS, ROUNDS = 16, 4.0, 3
READY_S = 60.0


# ---- a strategy over its calls


class _Instant:
    """An engine that has its whole answer at once, and counts the time it takes."""

    def __init__(self) -> None:
        self.spent_s = 0.0

    async def generate(self, request: GenerateRequest) -> Any:
        began_s = time.perf_counter()
        tokens = tuple(97 + n % 26 for n in range(request.max_tokens))
        chunk = TokenChunk("a" * len(tokens), tokens, finish_reason="length")
        self.spent_s += time.perf_counter() - began_s
        yield chunk

    async def score(self, member: str, tokens: Any) -> list[float]:
        return [-1.0] * (len(tokens) - 1)


def overheads(router: Path | None = None) -> dict[str, list[float]]:
    """Milliseconds that each strategy adds to an answer of 64 tokens, over what its calls took; by kind.

    Of broadcast, to each of the eight answers that it gives. `router` is the folder of a clustering; without one the
    router knows eight words, and is faster.
    """
    asked = Router.load(router) if router else _router([f"e{n:02d}" for n in range(NUM_MEMBERS)])
    return {kind: asyncio.run(_overhead_ms(config, asked)) for kind, config in STRATEGIES.items()}


STRATEGIES: dict[str, dict[str, Any]] = {
    "single": {"kind": "single", "member": "e00"},
    "route": {"kind": "route"},
    "mixture": {"kind": "mixture"},
    "mixture_likelihood": {"kind": "mixture", "by": "likelihood"},
    "broadcast": {"kind": "broadcast"},
    "fallback": {"kind": "fallback", "members": ["e00", "e01"]},
}


async def _overhead_ms(fields: dict[str, Any], router: Router) -> list[float]:
    """Of each answer after some that warm up."""
    config = registry.configure("strategy", fields)
    strategy = registry.find("strategy", config.kind)(config)
    engine, tokenizer = _Instant(), byte_tokenizer()
    members = {name: Member(name, engine, tokenizer, 4_096, cluster=n) for n, name in enumerate(router.ids)}  # type: ignore[arg-type]
    context = SwarmContext(router)
    request = GenerateRequest(tuple(tokenizer.encode(PROMPT)), {"e00": 1.0}, ANSWER_TOKENS)
    found = []
    for _ in range(WARM_UP + ANSWERS):
        began_s, before_s = time.perf_counter(), engine.spent_s
        said = [item async for item in strategy.answer(request, members, context, Budget())]
        took_s = time.perf_counter() - began_s - (engine.spent_s - before_s)
        answers = {item.index for item in said if isinstance(item, TokenChunk)}
        assert isinstance(said[-1], Ledger) and answers, "an answer, and its ledger"
        found.append(1e3 * took_s / len(answers))
    return found[WARM_UP:]


def _router(ids: list[str]) -> Router:
    """A router that knows one word of each expert."""
    words = {word: number for number, word in enumerate(WORDS)}
    eye = np.eye(len(words), dtype=np.float32)
    embedder = Embedder(words, np.ones(len(words), dtype=np.float32), eye)
    return Router(ids, embedder, eye[: len(ids)], np.full(len(ids), 1 / len(ids)), 0.1)


# ---- the gateway over many members


def gateway_rates(home: Path) -> dict[int, list[float]]:
    """Requests per second through the gateway, by number of echo members; Ray and the endpoint are its own.

    All numbers are asked by turns, so that the machine's moods meet each of them.
    """
    import ray

    checkpoint = home / "member"
    if not checkpoint.is_dir():
        spec = ulm.ModelSpec.preset("nano", vocab_size=byte_tokenizer().vocab_size, num_layers=1)
        ulm.save(ulm.build(spec), byte_tokenizer(), checkpoint)
    rates: dict[int, list[float]] = {number: [] for number in MEMBERS}
    ray.init(address="local", include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    try:
        for number in MEMBERS:
            rates[number] = _with_endpoint(checkpoint, number, _rates)
    finally:
        ray.shutdown()
    return rates


def _with_endpoint(checkpoint: Path, number: int, ask: Callable[[str, list[str]], list[float]]) -> list[float]:
    """What `ask` returns of an endpoint with so many members, in at most four replicas."""
    from serve import app
    from serve.plan import make_plan

    replicas = min(MOST_REPLICAS, number)
    fields = {
        "name": "echo",
        "members": {f"m{n:02d}": {"checkpoint": str(checkpoint)} for n in range(number)},
        "engine": {"kind": "echo"},
        "members_per_engine": -(-number // replicas),
        "port": _free_port(),
        "cpus": 0.1,
    }
    recipe = ServeRecipe.model_validate(fields)
    try:
        started = app.up(make_plan(recipe, root=checkpoint.parent, near=None), recipe)
        return ask(started["url"], list(recipe.members))
    finally:
        app.down()


def _rates(url: str, members: list[str]) -> list[float]:
    return asyncio.run(_measured_rates(url, members))


async def _measured_rates(url: str, members: list[str]) -> list[float]:
    """Requests per second of some clients that each ask one member after another, by rounds."""
    limits = httpx.Limits(max_connections=CLIENTS)
    async with httpx.AsyncClient(timeout=READY_S, trust_env=False, limits=limits) as client:

        async def ask(first: int, ends_s: float) -> int:
            done = 0
            while time.monotonic() < ends_s:
                body = {"model": members[(first + done) % len(members)], "prompt": PROMPT, "max_tokens": 8}
                (await client.post(f"{url}/completions", json=body)).raise_for_status()
                done += 1
            return done

        async def round_of(seconds: float) -> float:
            began_s = time.monotonic()
            counts = await asyncio.gather(*(ask(n, began_s + seconds) for n in range(CLIENTS)))
            return sum(counts) / (time.monotonic() - began_s)

        await round_of(1.0)
        return [await round_of(SECONDS) for _ in range(ROUNDS)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
