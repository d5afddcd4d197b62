"""The local engine's async surface: commands go to one thread that owns the models, chunks come back."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
import torch
from pydantic import Field

from serve.contracts import GenerateRequest, MemberInfo, RouterWeights, TokenChunk
from serve.engines.local.answer import Answer
from serve.engines.local.batch import Batch
from serve.engines.local.member import LoadedMember
from ulm import runtime
from ulm.checkpoints import store
from ulm.checkpoints.manifest import read_manifest
from ulm.components.cache import Cache
from ulm.errors import ModelNotFoundError, UlmError
from ulm.models.account import cache_bytes, num_parameters
from ulm.models.decoder import Decoder
from ulm.models.generate import room
from ulm.registry import KindConfig, register
from ulm.swarm.router import Router

log = logging.getLogger(__name__)
T = TypeVar("T")


class Config(KindConfig):
    """Rows are answers that a member works on at once; their KV cache is allocated when the member is loaded."""

    max_rows: int = Field(16, ge=1)
    kv_cache_bytes: int = Field(1 << 30, ge=1 << 16)  # per member: fewer rows where max_rows would need more
    prefill_tokens: int = Field(512, ge=1)  # prompt tokens per step
    num_prefixes: int = Field(4, ge=1)  # texts per member that next_logprobs remembers
    device: str | None = None  # None: CUDA where there is one
    threads: int | None = Field(None, ge=1)  # of torch on CPU; None: as the process has


@register("engine", Config)
class LocalEngine:
    """Holds members in one process; see batch.py for how answers share a step."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._device = runtime.device(config.device)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self._batch = Batch(config.prefill_tokens)
        self._infos: dict[str, MemberInfo] = {}
        self._routers: dict[str, Router] = {}
        self._prefixes: dict[str, OrderedDict[tuple[int, ...], Cache]] = {}
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="local-engine", daemon=True)
        self._thread.start()

    # ---- the thread that owns the models

    def _run(self) -> None:
        busy = False
        while True:
            try:
                command = self._commands.get(block=not busy)
            except queue.Empty:
                pass
            else:
                if command is None:
                    self._batch.fail_all(UlmError("the engine was closed"))
                    return
                command()
                busy = True
                continue
            try:
                busy = self._batch.step()
            except Exception as error:
                log.exception("a step failed; its answers end with this error")
                self._batch.fail_all(error)
                busy = False

    async def _call(self, function: Callable[[], T]) -> T:
        """Run a function in the engine's thread, between steps."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def settle(result: T | None, error: BaseException | None) -> None:
            if future.cancelled():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]

        def command() -> None:
            try:
                result, failure = function(), None
            except Exception as error:  # noqa: BLE001  handed to the caller, who awaits it
                result, failure = None, error
            loop.call_soon_threadsafe(settle, result, failure)

        self._commands.put(command)
        return await future

    # ---- members

    async def members(self) -> dict[str, MemberInfo]:
        """What is loaded now."""
        return dict(self._infos)

    async def load(self, member: str, checkpoint: str) -> MemberInfo:
        """Make a member from a checkpoint folder."""
        path = Path(checkpoint)
        loaded, tokenizer = await asyncio.to_thread(store.load, path, self._device)
        model = cast(Decoder, loaded.eval().requires_grad_(False))
        size = cache_bytes(model.spec, next(model.parameters()).dtype)
        row_bytes = size.fixed + size.per_token * model.spec.context_tokens
        max_rows = max(1, min(self.config.max_rows, self.config.kv_cache_bytes // row_bytes))
        info = MemberInfo(
            str(path),
            read_manifest(path).digest,
            model.spec.context_tokens,
            model.spec.vocab_size,
            num_parameters(model),
        )

        def install() -> MemberInfo:
            self._batch.members[member] = LoadedMember(member, model, tokenizer, max_rows)
            self._prefixes[member] = OrderedDict()
            self._infos[member] = info
            return info

        return await self._call(install)

    async def unload(self, member: str) -> None:
        """Forget a member; answers under way are finished."""

        def remove() -> None:
            self._member(member)
            for table in (self._batch.members, self._prefixes, self._infos):
                table.pop(member)

        await self._call(remove)

    async def reload(self, member: str, checkpoint: str) -> MemberInfo:
        """New weights for a member; answers under way go on with the old ones."""
        self._member(member)
        return await self.load(member, checkpoint)

    def _member(self, member: str) -> LoadedMember:
        if member not in self._batch.members:
            raise ModelNotFoundError(f"The engine has no member {member!r}", code="model_not_found")
        return self._batch.members[member]

    # ---- answers

    async def generate(self, request: GenerateRequest) -> AsyncIterator[TokenChunk]:
        """Chunks of an answer; closing the iterator cancels it."""
        loop = asyncio.get_running_loop()
        chunks: asyncio.Queue[TokenChunk | Exception] = asyncio.Queue()

        held: list[TokenChunk] = []

        def emit(chunk: TokenChunk | Exception) -> None:
            """Wake the event loop: for every chunk of a stream, else once, with all of them as one."""
            if isinstance(chunk, TokenChunk) and not request.stream:
                held.append(chunk)
                if chunk.finish_reason is None:
                    return
                chunk = TokenChunk.joined(held)
            loop.call_soon_threadsafe(chunks.put_nowait, chunk)

        def begin() -> Answer:
            router = self._router(request.weights)
            answer = self._batch.answer(request, router, emit)
            self._batch.add(answer)
            return answer

        answer = await self._call(begin)
        try:
            finished = False
            while not finished:
                chunk = await chunks.get()
                if isinstance(chunk, Exception):
                    raise chunk
                finished = chunk.finish_reason is not None
                yield chunk
        finally:
            answer.cancelled = True  # without effect on one that has ended

    def _router(self, weights: object) -> Router | None:
        if not isinstance(weights, RouterWeights):
            return None
        if weights.path not in self._routers:
            self._routers[weights.path] = Router.load(Path(weights.path))
        return self._routers[weights.path]

    async def score(self, member: str, tokens: Sequence[int]) -> list[float]:
        """log p(tokens[i] | tokens[:i]) for i >= 1, in nats."""

        def run() -> list[float]:
            loaded = self._member(member)
            room(len(tokens) - 1, loaded.model.spec.context_tokens)
            ids = torch.tensor(tokens, device=self._device)
            with torch.no_grad():
                logprobs_TV = loaded.model(ids[None, :-1])[0].float().log_softmax(-1)
            scores: list[float] = logprobs_TV.gather(1, ids[1:, None])[:, 0].tolist()
            return scores

        return await self._call(run)

    async def next_logprobs(self, member: str, tokens: Sequence[int]) -> np.ndarray:
        """Log-probabilities of the whole vocabulary after `tokens`; prefixes seen lately are not recomputed."""

        def run() -> np.ndarray:
            loaded, ids = self._member(member), tuple(tokens)
            room(len(ids), loaded.model.spec.context_tokens)
            prefixes = self._prefixes[member]
            shared = {known: _common(known, ids) for known in prefixes}
            best = max(shared, key=shared.__getitem__, default=())
            if best and shared[best] == len(best):
                cache = prefixes.pop(best)  # grows in place
            elif len(prefixes) >= self.config.num_prefixes:
                cache = prefixes.popitem(last=False)[1]  # the oldest text makes room
                cache.truncate(0, 0)
            else:
                cache = loaded.model.new_cache(1)
            cache.truncate(0, min(int(cache.lengths_B[0]), len(ids) - 1))  # the last token must be run for its logits
            new = ids[int(cache.lengths_B[0]) :]
            logits_BTV = loaded.model.step(torch.tensor([new], device=self._device), cache)
            prefixes[ids] = cache
            return np.asarray(logits_BTV[0, -1].float().log_softmax(-1).cpu().numpy())

        return await self._call(run)

    async def embed(self, member: str, tokens: Sequence[int]) -> np.ndarray:
        """Mean of the last hidden states."""

        def run() -> np.ndarray:
            loaded = self._member(member)
            room(len(tokens), loaded.model.spec.context_tokens)
            with torch.no_grad():
                hidden_BTD = loaded.model.hidden(torch.tensor([list(tokens)], device=self._device))
            return np.asarray(hidden_BTD[0].float().mean(0).cpu().numpy())

        return await self._call(run)

    async def stats(self) -> dict[str, float]:
        """Running and waiting answers, generated tokens, memory."""
        batch = self._batch
        return {
            "running": float(len(batch.running)),
            "waiting": float(len(batch.waiting)),
            "generated_tokens": float(batch.num_generated_tokens),
            "resident_bytes": float(runtime.rss_bytes()),
            "gpu_bytes": float(runtime.gpu_bytes()),
            "kv_cache_bytes": float(sum(m.cache.nbytes for m in list(batch.members.values()))),
        }

    async def close(self) -> None:
        """End the thread; answers under way fail."""
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
