"""The local engine's async surface: commands go to one thread that owns the models, chunks come back."""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from serve.contracts import GenerateRequest, MemberInfo, RouterWeights, TokenChunk
from serve.engines.local.answer import Answer, Want
from serve.engines.local.members import Loaded
from serve.engines.local.rows import Rows
from serve.engines.local.runner import Runner
from serve.engines.local.scheduler import Scheduler
from serve.engines.local.stack import Stack, can_stack
from ulm import runtime
from ulm.checkpoints import store
from ulm.checkpoints.manifest import read_manifest
from ulm.errors import ConfigError, ModelNotFoundError, OverloadedError, UlmError, UnsupportedError
from ulm.models.account import num_parameters, on_meta
from ulm.registry import KindConfig, register
from ulm.spec import ModelSpec
from ulm.swarm.router import Router
from ulm.tokenizers.tokenizer import Tokenizer

log = logging.getLogger(__name__)
T = TypeVar("T")
MAX_CACHE_BYTES = 1 << 30  # on a CPU, unless the recipe says more
CACHE_SHARE = {"cpu": 0.25, "cuda": 0.8}  # of the memory that is free when the first member of a spec is loaded


class Config(KindConfig):
    """What the engine may use. Members of one spec share their memory for keys and values."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of weights and cache; auto: as the checkpoint has them
    kv_cache_bytes: int | None = Field(None, ge=1 << 16)  # for each spec; None: a share of what is free
    max_weight_bytes: int | None = Field(None, ge=1)  # of all members; beyond it those used longest ago are put away
    max_answers: int = Field(256, ge=1)  # choices worked on at once
    max_batch_tokens: int = Field(512, ge=1)  # of a step, prompts included: a long one does not stall the others
    max_waiting: int = Field(1_024, ge=1)  # requests beyond it are refused
    num_prefixes: int = Field(4, ge=1)  # texts per member that next_logprobs remembers, for kinds without pages
    compile_after_steps: int | None = Field(500, ge=0)  # a batch size used so often is compiled, meanwhile; None: none
    max_compile_s: float = Field(120.0, ge=0)  # for each spec, in the background
    device: str | None = None  # None: CUDA where there is one
    threads: int | None = Field(None, ge=1)  # of torch on CPU; None: as the process has


@dataclass(eq=False)
class Mailbox:
    """Where an answer's results go: a queue of the event loop that asked."""

    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)


@dataclass(frozen=True)
class Source:
    """Where a member comes from, loaded or put away."""

    path: Path
    spec: ModelSpec
    tokenizer: Tokenizer
    info: MemberInfo


@register("engine", Config)
class LocalEngine:
    """Holds members in one process; see scheduler.py for how answers share a step."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._device = runtime.device(config.device)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self._scheduler = Scheduler(config.max_answers, config.max_batch_tokens, config.max_waiting)
        self._sources: dict[str, Source] = {}
        self._loaded: dict[str, Loaded] = {}
        self._runners: dict[tuple[str, torch.dtype], list[Runner]] = {}
        self._routers: dict[str, Router] = {}
        self._numbers = itertools.count()
        self._num_evictions = 0
        self._changing: asyncio.Lock | None = None  # one load, unload or reload at a time
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
                    self._scheduler.fail_all(UlmError("the engine was closed"))
                    self._deliver()
                    return
                command()
                busy = True
                continue
            try:
                busy = self._scheduler.step()
            except Exception as error:
                log.exception("a step failed; its answers end with this error")
                self._scheduler.fail_all(error)
                busy = False
            self._deliver()

    def _deliver(self) -> None:
        """Hand a step's results to the event loops that wait for them, each woken once."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Queue[Any], Any]]] = {}
        for answer, item in self._scheduler.outbox:
            mailbox: Mailbox = answer.mailbox
            by_loop.setdefault(mailbox.loop, []).append((mailbox.queue, item))
        self._scheduler.outbox.clear()
        for loop, items in by_loop.items():
            try:
                loop.call_soon_threadsafe(_put_all, items)
            except RuntimeError:  # whoever asked has closed the loop: nobody is left to be told
                log.debug("results for a closed event loop were dropped")

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
        """What can be asked: loaded, or put away and loaded again when it is asked."""
        return {member: source.info for member, source in self._sources.items()}

    async def load(self, member: str, checkpoint: str) -> MemberInfo:
        """Make a member from a checkpoint folder. One of that name is replaced, whatever it was."""
        async with self._change():
            source = await asyncio.to_thread(self._read_source, checkpoint)
            await self._install(member, source)
            return source.info

    async def unload(self, member: str) -> None:
        """Forget a member; answers under way are finished."""
        async with self._change():
            self._source(member)

            def remove() -> None:
                self._sources.pop(member)
                if (loaded := self._loaded.pop(member, None)) is not None:
                    loaded.retire()
                self._drop_empty()

            await self._call(remove)

    async def reload(self, member: str, checkpoint: str) -> MemberInfo:
        """New weights for a member; answers under way go on with the old ones. ConfigError for another shape."""
        async with self._change():
            old = self._source(member)
            source = await asyncio.to_thread(self._read_source, checkpoint)
            if source.spec != old.spec:
                problem = f"{checkpoint} has another spec than member {member!r}, which is loaded from {old.path}"
                raise ConfigError("reload", problem, "unload the member and load this one, or give it another name")
            if source.tokenizer.digest != old.tokenizer.digest:
                problem = f"{checkpoint} has another tokenizer than member {member!r}"
                raise ConfigError("reload", problem, "unload the member and load this one, or give it another name")
            await self._install(member, source)
            return source.info

    def _change(self) -> asyncio.Lock:
        if self._changing is None:  # made where a loop runs
            self._changing = asyncio.Lock()
        return self._changing

    def _source(self, member: str) -> Source:
        if member not in self._sources:
            raise ModelNotFoundError(f"The engine has no member {member!r}", code="model_not_found")
        return self._sources[member]

    @staticmethod
    def _read_source(checkpoint: str) -> Source:
        path = store.resolve(checkpoint, root=runtime.root())
        spec = store.read_spec(path)
        info = MemberInfo(
            str(path),
            read_manifest(path).digest,
            spec.context_tokens,
            spec.vocab_size,
            num_parameters(on_meta(spec)),
        )
        return Source(path, spec, store.read_tokenizer(path), info)

    async def _install(self, member: str, source: Source) -> None:
        """Weights into a slot, and the member's name onto it; what else has to go, goes first."""
        tensors = await asyncio.to_thread(store.read_weights, source.path)
        dtype = self._dtype(tensors)
        num_bytes = source.info.num_parameters * dtype.itemsize
        await self._call(lambda: self._make_room(member, num_bytes))
        runner, slot = await asyncio.to_thread(self._find_slot, source.spec, dtype)
        await asyncio.to_thread(runner.put, slot, tensors)

        def install() -> None:
            number = next(self._numbers)
            loaded = Loaded(
                member, source.path, source.spec, source.tokenizer, runner, slot, number, num_bytes, source.info
            )
            if (old := self._loaded.get(member)) is not None:
                old.retire()
            self._loaded[member], self._sources[member] = loaded, source
            self._drop_empty()

        await self._call(install)

    def _dtype(self, tensors: dict[str, Tensor]) -> torch.dtype:
        if self.config.dtype != "auto":
            return cast(torch.dtype, getattr(torch, self.config.dtype))
        return torch.bfloat16 if any(t.dtype == torch.bfloat16 for t in tensors.values()) else torch.float32

    def _make_room(self, member: str, num_bytes: int) -> None:
        """Put members away, those used longest ago first, until another fits; UnsupportedError where it cannot."""
        limit = self.config.max_weight_bytes
        if limit is None:
            return
        idle = sorted((m for m in self._loaded.values() if not m.num_users and m.id != member), key=lambda m: m.used_s)
        held = sum(m.num_bytes for m in self._loaded.values())
        if num_bytes > limit:
            raise UnsupportedError(f"member {member!r}: {num_bytes:,} bytes of weights; max_weight_bytes is {limit:,}")
        while held + num_bytes > limit:
            if not idle:
                problem = f"{num_bytes:,} bytes of weights do not fit beside the {held:,} bytes of members at work"
                remedy = f"ask again later, or allow more than max_weight_bytes = {limit:,}"
                raise OverloadedError(f"member {member!r}: {problem}: {remedy}", code="overloaded")
            away = idle.pop(0)
            self._loaded.pop(away.id).retire()
            self._num_evictions += 1
            held -= away.num_bytes

    def _find_slot(self, spec: ModelSpec, dtype: torch.dtype) -> tuple[Runner, int]:
        """Where another member of a spec can be put. Only one caller at a time."""
        runners = self._runners.setdefault((store.spec_digest(spec), dtype), [])
        for runner in runners:
            for slot in range(runner.max_slots):
                if slot not in runner.used_slots:
                    runner.used_slots.add(slot)
                    return runner, slot
        runner = self._new_runner(spec, dtype)
        runner.used_slots.add(0)
        runners.append(runner)
        return runner, 0

    def _new_runner(self, spec: ModelSpec, dtype: torch.dtype) -> Runner:
        cache_bytes = self.config.kv_cache_bytes
        if cache_bytes is None:
            cache_bytes = int(CACHE_SHARE[self._device.type] * runtime.free_bytes(self._device))
            cache_bytes = min(cache_bytes, MAX_CACHE_BYTES) if self._device.type == "cpu" else cache_bytes
        if can_stack(spec):
            return Stack(
                spec,
                dtype=dtype,
                device=self._device,
                kv_cache_bytes=cache_bytes,
                max_batch_tokens=self.config.max_batch_tokens,
                compile_after_steps=self.config.compile_after_steps,
                max_compile_s=self.config.max_compile_s,
            )
        return Rows(
            spec,
            dtype=dtype,
            device=self._device,
            kv_cache_bytes=cache_bytes,
            max_rows=self.config.max_answers,
            num_prefixes=self.config.num_prefixes,
        )

    def _drop_empty(self) -> None:
        """Give back the memory of runners without members."""
        for key, runners in list(self._runners.items()):
            self._runners[key] = [runner for runner in runners if runner.used_slots]
            if not self._runners[key]:
                del self._runners[key]

    # ---- answers

    async def generate(self, request: GenerateRequest) -> AsyncIterator[TokenChunk]:
        """Chunks of an answer; closing the iterator cancels it."""
        request.check()
        answer = await self._begin(request, "text")
        num_open = request.n
        try:
            while num_open:
                chunk = await self._next(answer)
                num_open -= chunk.finish_reason is not None
                yield chunk
        finally:
            answer.cancelled = True  # without effect on one that has ended

    async def _begin(self, request: GenerateRequest, want: Want) -> Answer:
        """An answer over members that are loaded now; those put away are loaded first."""
        asked = request.weights
        named = asked.members if isinstance(asked, RouterWeights) else [m for m, w in asked.items() if w > 0]
        for member in named:
            self._source(member)
        mailbox = Mailbox(asyncio.get_running_loop())
        while True:
            for member in named:
                if member not in self._loaded:
                    await self._bring_back(member)

            def begin() -> Answer | None:
                if not all(member in self._loaded for member in named):
                    return None  # one was put away in the meantime
                members = {member: self._loaded[member] for member in named}
                if len({m.tokenizer.digest for m in members.values()}) > 1:
                    raise UnsupportedError("members of one mixture must share a tokenizer")
                for loaded in members.values():
                    request.sampling.check(loaded.spec.vocab_size)
                answer = Answer(request, members, self._router(request.weights), want, mailbox)
                self._scheduler.add(answer)
                return answer

            answer = await self._call(begin)
            if answer is not None:
                return answer

    async def _bring_back(self, member: str) -> None:
        async with self._change():
            if member not in self._loaded:
                await self._install(member, self._source(member))

    @staticmethod
    async def _next(answer: Answer) -> Any:
        found = await answer.mailbox.queue.get()
        if isinstance(found, Exception):
            raise found
        return found

    def _router(self, weights: object) -> Router | None:
        if not isinstance(weights, RouterWeights):
            return None
        if weights.path not in self._routers:
            self._routers[weights.path] = Router.load(Path(weights.path))
        return self._routers[weights.path]

    async def score(self, member: str, tokens: Sequence[int]) -> list[float]:
        """log p(tokens[i] | tokens[:i]) for i >= 1, in nats."""
        request = GenerateRequest(tuple(tokens), {member: 1.0}, 0, prompt_logprobs=0, stream=False)
        chunks = [chunk async for chunk in self.generate(request)]
        return [entry.logprob for entry in chunks[0].prompt_logprobs]

    async def next_logprobs(self, member: str, tokens: Sequence[int]) -> np.ndarray:
        """Log-probabilities of the whole vocabulary after `tokens`; prefixes seen lately are not recomputed."""
        return np.asarray(await self._look(member, tokens, "next"))

    async def embed(self, member: str, tokens: Sequence[int]) -> np.ndarray:
        """Mean of the last hidden states."""
        return np.asarray(await self._look(member, tokens, "hidden"))

    async def _look(self, member: str, tokens: Sequence[int], want: Want) -> Tensor:
        """What one pass over a text finds."""
        request = GenerateRequest(tuple(tokens), {member: 1.0}, 1, stream=False)
        request.check()
        answer = await self._begin(request, want)
        try:
            return cast(Tensor, await self._next(answer))
        finally:
            answer.cancelled = True

    async def stats(self) -> dict[str, float]:
        """Running and waiting answers, generated tokens, memory."""
        scheduler, found = self._scheduler, {"weight_bytes": 0.0, "kv_cache_bytes": 0.0, "kv_cache_used_bytes": 0.0}
        for runner in [runner for runners in list(self._runners.values()) for runner in runners]:
            for name, value in runner.stats().items():
                found[name] = found.get(name, 0.0) + value
        return {
            "running": float(len(scheduler.running)),
            "waiting": float(len(scheduler.waiting)),
            "generated_tokens": float(scheduler.num_generated_tokens),
            "steps": float(scheduler.num_steps),
            "preemptions": float(scheduler.num_preemptions),
            "evictions": float(self._num_evictions),
            "members": float(len(self._loaded)),
            "resident_bytes": float(runtime.rss_bytes()),
            "gpu_bytes": float(runtime.gpu_bytes()),
            **found,
        }

    async def close(self) -> None:
        """End the thread; answers under way fail."""
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)
        for runner in [runner for runners in self._runners.values() for runner in runners]:
            await asyncio.to_thread(runner.end)


def _put_all(items: Sequence[tuple[asyncio.Queue[Any], Any]]) -> None:
    for mailbox, item in items:
        mailbox.put_nowait(item)
