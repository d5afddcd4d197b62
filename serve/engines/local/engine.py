"""The local engine's async surface: commands go to one thread that owns the models, chunks come back."""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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
from ulm.errors import (
    ArtefactError,
    ConfigError,
    ModelNotFoundError,
    OverloadedError,
    RequestError,
    UlmError,
    UnsupportedError,
)
from ulm.models.account import num_parameters, on_meta
from ulm.registry import KindConfig, register
from ulm.spec import ModelSpec
from ulm.swarm.router import Router
from ulm.tokenizers.tokenizer import Tokenizer

log = logging.getLogger(__name__)
T = TypeVar("T")
CLOSED = "the engine was closed"
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
        self._leaving: list[Loaded] = []  # retired, with answers under way
        self._is_closed = False
        self._commands: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="local-engine", daemon=True)
        self._thread.start()
        # One load, unload or reload at a time, whoever asks; it is brought to its end when who asked has left.
        self._changes = ThreadPoolExecutor(1, thread_name_prefix="local-engine-changes")

    # ---- the thread that owns the models

    def _run(self) -> None:
        try:
            busy = False
            while True:
                try:
                    command = self._commands.get(block=not busy)
                except queue.Empty:
                    pass
                else:
                    if command is None:
                        return
                    _settle(*command)
                    busy = True
                    continue
                busy = self._step()
        finally:  # also where the engine itself has failed: nobody may wait for it
            self._is_closed = True
            self._refuse_commands()
            self._scheduler.fail_all(UlmError(CLOSED))
            self._deliver()

    def _step(self) -> bool:
        """One step, and what comes of it; whether there is more to do."""
        try:
            busy = self._scheduler.step()
        except Exception as error:
            log.exception("a step failed; all answers end with this error")
            self._scheduler.fail_all(error)
            busy = False
        self._deliver()
        if any(not loaded.num_users for loaded in self._leaving):
            self._drop_empty()
        return busy

    def _deliver(self) -> None:
        """Hand a step's results to the event loops that wait for them, each woken once."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Answer, Any]]] = {}
        for answer, item in self._scheduler.outbox:
            by_loop.setdefault(answer.mailbox.loop, []).append((answer, item))
        self._scheduler.outbox.clear()
        for loop, items in by_loop.items():
            try:
                loop.call_soon_threadsafe(_put_all, items)
            except RuntimeError:  # whoever asked has closed the loop: nobody is left to be told
                for answer, _ in items:
                    answer.cancelled = True

    def _refuse_commands(self) -> None:
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            if command is not None and command[1].set_running_or_notify_cancel():
                command[1].set_exception(UlmError(CLOSED))

    def _submit(self, function: Callable[[], T]) -> Future[T]:
        """Have a function run in the engine's thread, between steps."""
        future: Future[T] = Future()
        self._commands.put((function, future))
        if self._is_closed:  # looked at behind the put: either side refuses what the other has missed
            self._refuse_commands()
        return future

    def _do(self, function: Callable[[], T]) -> T:
        """The same, waited for: for the thread that changes members."""
        return self._submit(function).result()

    def _change(self, function: Callable[[], T]) -> Future[T]:
        """Have a function run in the thread that changes members."""
        try:
            return self._changes.submit(function)
        except RuntimeError:  # it has ended
            raise UlmError(CLOSED) from None

    # ---- members

    async def members(self) -> dict[str, MemberInfo]:
        """What can be asked: loaded, or put away and loaded again when it is asked."""
        return {member: source.info for member, source in list(self._sources.items())}

    async def load(self, member: str, checkpoint: str) -> MemberInfo:
        """Make a member from a checkpoint folder. One of that name is replaced, whatever it was."""

        def load() -> MemberInfo:
            source = self._read_source(checkpoint)
            self._install(member, source)
            return source.info

        return await asyncio.wrap_future(self._change(load))

    async def unload(self, member: str) -> None:
        """Forget a member; answers under way are finished."""

        def remove() -> None:
            self._source(member)
            self._sources.pop(member)
            self._put_away(member)
            self._drop_empty()

        await asyncio.wrap_future(self._change(lambda: self._do(remove)))

    async def reload(self, member: str, checkpoint: str) -> MemberInfo:
        """New weights for a member; answers under way go on with the old ones. ConfigError for another shape."""

        def reload() -> MemberInfo:
            old, source = self._source(member), self._read_source(checkpoint)
            remedy = "unload the member and load this one, or give it another name"
            if source.spec != old.spec:
                problem = f"{checkpoint} has another spec than member {member!r}, which is loaded from {old.path}"
                raise ConfigError("reload", problem, remedy)
            if source.tokenizer.digest != old.tokenizer.digest:
                raise ConfigError("reload", f"{checkpoint} has another tokenizer than member {member!r}", remedy)
            self._install(member, source)
            return source.info

        return await asyncio.wrap_future(self._change(reload))

    def _source(self, member: str) -> Source:
        source = self._sources.get(member)
        if source is None:
            raise ModelNotFoundError(f"The engine has no member {member!r}", code="model_not_found")
        return source

    @staticmethod
    def _read_source(checkpoint: str) -> Source:
        path = store.resolve(checkpoint, root=runtime.root())
        spec, tokenizer = store.read_spec(path), store.read_tokenizer(path)
        if spec.vocab_size != tokenizer.vocab_size:
            sizes = f"its tokenizer has {tokenizer.vocab_size} tokens, its model {spec.vocab_size}"
            raise ArtefactError(f"{path}: {sizes}: some could be read or written by one of them only")
        info = MemberInfo(
            str(path),
            read_manifest(path).digest,
            spec.context_tokens,
            spec.vocab_size,
            num_parameters(on_meta(spec)),
        )
        return Source(path, spec, tokenizer, info)

    def _install(self, member: str, source: Source, beside: Collection[str] = ()) -> None:
        """Weights into a slot, and the member's name onto it. What else has to go, goes first; `beside` stays."""
        tensors = store.read_weights(source.path)
        _check_weights(source, tensors)
        dtype = self._dtype(tensors)
        num_bytes = source.info.num_parameters * dtype.itemsize
        self._do(lambda: self._make_room(member, num_bytes, beside))
        runner, slot = self._find_slot(source.spec, dtype)
        try:
            runner.put(slot, tensors)
        except Exception:
            self._do(lambda: runner.used_slots.discard(slot))
            self._do(self._drop_empty)
            raise

        def install() -> None:
            number = next(self._numbers)
            loaded = Loaded(
                member, source.path, source.spec, source.tokenizer, runner, slot, number, num_bytes, source.info
            )
            self._put_away(member)
            self._loaded[member], self._sources[member] = loaded, source
            self._drop_empty()

        self._do(install)

    def _put_away(self, member: str) -> None:
        """No new answers for a member; its weights go with its last answer."""
        if (loaded := self._loaded.pop(member, None)) is not None:
            loaded.retire()
            if loaded.num_users:
                self._leaving.append(loaded)

    def _dtype(self, tensors: dict[str, Tensor]) -> torch.dtype:
        if self.config.dtype != "auto":
            return cast(torch.dtype, getattr(torch, self.config.dtype))
        return torch.bfloat16 if any(t.dtype == torch.bfloat16 for t in tensors.values()) else torch.float32

    def _make_room(self, member: str, num_bytes: int, beside: Collection[str]) -> None:
        """Put members away, those used longest ago first, until another fits; nobody's where it cannot.

        UnsupportedError where it never could, alone or with those that it is wanted with; else OverloadedError.
        """
        limit = self.config.max_weight_bytes
        if limit is None:
            return
        kept = [m for m in beside if m in self._loaded and m != member]
        wanted = num_bytes + sum(self._loaded[m].num_bytes for m in kept)
        if wanted > limit:
            together = f" together with {', '.join(map(repr, kept))}" if kept else ""
            problem = f"member {member!r}{together}: {wanted:,} bytes of weights; max_weight_bytes is {limit:,}"
            raise UnsupportedError(problem)
        held = sum(m.num_bytes for m in [*self._loaded.values(), *self._leaving])
        idle = [m for m in self._loaded.values() if not m.num_users and m.id not in kept]
        at_work = held - sum(m.num_bytes for m in idle)
        if at_work + num_bytes > limit:
            problem = f"{num_bytes:,} bytes of weights do not fit beside the {at_work:,} bytes of members at work"
            remedy = f"ask again later, or allow more than max_weight_bytes = {limit:,}"
            raise OverloadedError(f"member {member!r}: {problem}: {remedy}", code="overloaded")
        idle.sort(key=lambda m: (m.id != member, m.used_s))  # what is replaced goes first
        for away in idle:
            if held + num_bytes <= limit:
                break
            self._put_away(away.id)
            self._num_evictions += away.id != member
            held -= away.num_bytes
        self._drop_empty()

    def _find_slot(self, spec: ModelSpec, dtype: torch.dtype) -> tuple[Runner, int]:
        """Where another member of a spec can be put."""
        key = store.spec_digest(spec), dtype

        def find() -> tuple[Runner, int] | None:
            for runner in self._runners.get(key, ()):
                for slot in range(runner.max_slots):
                    if slot not in runner.used_slots:
                        runner.used_slots.add(slot)
                        return runner, slot
            return None

        if (found := self._do(find)) is not None:
            return found
        made = self._new_runner(spec, dtype)
        made.used_slots.add(0)
        self._do(lambda: self._runners.setdefault(key, []).append(made))
        return made, 0

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
        self._leaving = [loaded for loaded in self._leaving if loaded.num_users]
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
            _check_tokens(request.tokens, self._source(member))
        router = await self._router(asked) if isinstance(asked, RouterWeights) else None
        mailbox = Mailbox(asyncio.get_running_loop())

        def begin() -> Answer | None:
            if not all(member in self._loaded for member in named):
                return None
            members = {member: self._loaded[member] for member in named}
            if len({m.tokenizer.digest for m in members.values()}) > 1:
                raise UnsupportedError("members of one mixture must share a tokenizer")
            for loaded in members.values():
                request.sampling.check(loaded.spec.vocab_size)
            answer = Answer(request, members, router, want, mailbox)
            self._scheduler.add(answer)
            return answer

        def bring_back() -> Answer | None:
            for member in named:
                if member not in self._loaded:
                    self._install(member, self._source(member), beside=named)
            return self._do(begin)  # in the thread that changes members: nobody can be put away in between

        answer = await _begun(self._submit(begin)) or await _begun(self._change(bring_back))
        assert answer is not None
        return answer

    @staticmethod
    async def _next(answer: Answer) -> Any:
        found = await answer.mailbox.queue.get()
        if isinstance(found, Exception):
            raise found
        return found

    async def _router(self, asked: RouterWeights) -> Router:
        """A clustering's router, read once; RequestError where it weighs others than were named."""
        if asked.path not in self._routers:
            self._routers[asked.path] = await asyncio.to_thread(Router.load, Path(asked.path))
        router = self._routers[asked.path]
        if len(router.ids) != len(asked.members):
            problem = f"the router in {asked.path} weighs {len(router.ids)} members, and {len(asked.members)} are named"
            raise RequestError(f"weights: {problem}", param="weights")
        return router

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
        """End the threads; answers under way fail, and so does what is asked later."""
        self._commands.put(None)
        await asyncio.to_thread(self._end)

    def _end(self) -> None:
        self._thread.join()
        self._changes.shutdown()  # what is under way there finds the engine closed
        for runner in [runner for runners in self._runners.values() for runner in runners]:
            runner.end()


def _settle(function: Callable[[], Any], future: Future[Any]) -> None:
    """Run a function, unless who asked for it has left."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except Exception as error:  # noqa: BLE001  handed to the caller, who waits for it
        future.set_exception(error)


async def _begun(future: Future[Answer | None]) -> Answer | None:
    """The answer that a future brings; one that nobody waits for any more ends at once."""
    try:
        return await asyncio.wrap_future(future)
    except asyncio.CancelledError:
        future.add_done_callback(_abandon)
        raise


def _abandon(future: Future[Answer | None]) -> None:
    if not future.cancelled() and future.exception() is None and (answer := future.result()) is not None:
        answer.cancelled = True


def _put_all(items: Sequence[tuple[Answer, Any]]) -> None:
    for answer, item in items:
        answer.mailbox.queue.put_nowait(item)


def _check_tokens(tokens: Sequence[int], source: Source) -> None:
    """RequestError for what is no token of a member's: it must never reach a table's rows."""
    ids = np.asarray(tokens)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise RequestError("prompt: token ids are whole numbers", param="prompt")
    wrong = ids[(ids < 0) | (ids >= source.spec.vocab_size)]
    if len(wrong):
        sizes = f"the vocabulary has {source.spec.vocab_size}, from 0 on"
        raise RequestError(f"prompt: there is no token {wrong[0]}: {sizes}", param="prompt")


def _check_weights(source: Source, tensors: dict[str, Tensor]) -> None:
    """ArtefactError where the names or shapes of a checkpoint's weights are not its spec's."""
    own = store.tensors(on_meta(source.spec))
    for name in sorted(own.keys() | tensors.keys()):
        stored, needed = (tuple(of[name].shape) if name in of else None for of in (tensors, own))
        if stored != needed:
            raise ArtefactError(f"{source.path}: {name} is {stored}, the spec's model has {needed}")
