"""The local engine's async surface: commands go to one thread that owns the models, chunks come back."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from serve.constrained import Grammars
from serve.contracts import GenerateRequest, MemberInfo, TokenChunk
from serve.engines.local.answer import Answer, Want
from serve.engines.local.members import Members, Source
from serve.engines.local.scheduler import Scheduler
from ulm import runtime
from ulm.errors import MemberDownError, RequestError, UnsupportedError
from ulm.registry import KindConfig, register

log = logging.getLogger(__name__)
T = TypeVar("T")
CLOSED = "the engine was closed"


class Config(KindConfig):
    """What the engine may use. Members of one spec share their memory for keys and values."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of weights and cache; auto: as the checkpoint has them
    kv_cache_bytes: int | None = Field(None, ge=1 << 16)  # for each spec; None: a share of what is free
    max_weight_bytes: int | None = Field(None, ge=1)  # of all members; beyond it those used longest ago are put away
    max_answers: int = Field(256, ge=1)  # choices worked on at once
    max_batch_tokens: int = Field(512, ge=1)  # of a step, prompts included: a long one does not stall the others
    max_waiting: int = Field(1_024, ge=1)  # requests beyond it are refused
    num_prefixes: int = Field(4, ge=1)  # texts per member that next_logprobs remembers, for kinds without pages
    compile_after_steps: int | None = Field(
        2_000, ge=0
    )  # a batch size used so often is compiled, meanwhile; None: none
    max_compile_s: float = Field(120.0, ge=0)  # for each spec, in the background
    device: str | None = None  # None: CUDA where there is one
    threads: int | None = Field(None, ge=1)  # of torch on CPU; None: as the process has


@dataclass(eq=False)
class Mailbox:
    """Where an answer's results go: a queue of the event loop that asked."""

    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)


@register("engine", Config)
class LocalEngine:
    """Holds members in one process; see scheduler.py for how answers share a step."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._device = runtime.device(config.device)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self._scheduler = Scheduler(config.max_answers, config.max_batch_tokens, config.max_waiting)
        self._members = Members(config, self._device, self._do)
        self._grammars = Grammars()
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
            self._scheduler.fail_all(MemberDownError(CLOSED))
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
        self._members.let_go()
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
                command[1].set_exception(MemberDownError(CLOSED))

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
            raise MemberDownError(CLOSED) from None

    def _check_open(self) -> None:
        if self._is_closed:
            raise MemberDownError(CLOSED)

    # ---- members

    async def members(self) -> dict[str, MemberInfo]:
        """What can be asked: loaded, or put away and loaded again when asked. MemberDownError once it has ended."""
        self._check_open()
        return {member: source.info for member, source in list(self._members.sources.items())}

    async def load(self, member: str, checkpoint: str) -> MemberInfo:
        """Make a member from a checkpoint folder. One of that name is replaced, whatever it was."""
        return await asyncio.wrap_future(self._change(lambda: self._members.load(member, checkpoint)))

    async def unload(self, member: str) -> None:
        """Forget a member; answers under way are finished."""
        await asyncio.wrap_future(self._change(lambda: self._members.unload(member)))

    async def reload(self, member: str, checkpoint: str) -> MemberInfo:
        """New weights for a member; answers under way go on with the old ones. ConfigError for another shape."""
        return await asyncio.wrap_future(self._change(lambda: self._members.reload(member, checkpoint)))

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
        named = sorted(m for m, w in request.weights.items() if w > 0)  # in one order, whatever the request's
        for member in named:
            _check_tokens(request.tokens, self._members.source(member))
            if request.generated:
                _check_tokens(request.generated, self._members.source(member), "generated")
        tokenizer, constraint = self._members.source(named[0]).tokenizer, None
        if request.json_schema is not None:
            constraint = await self._grammars.begin(tokenizer, request.json_schema, request.generated)
        mailbox = Mailbox(asyncio.get_running_loop())

        def begin() -> Answer | None:
            if not all(member in self._members.loaded for member in named):
                return None
            members = {member: self._members.loaded[member] for member in named}
            if any(m.tokenizer.digest != tokenizer.digest for m in members.values()):
                raise UnsupportedError("members of one mixture must share a tokenizer")
            for loaded in members.values():
                request.sampling.check(loaded.spec.vocab_size)
            answer = Answer(request, members, want, mailbox, constraint)
            self._scheduler.add(answer)
            return answer

        def bring_back() -> Answer | None:
            self._members.bring_back(named)
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

    async def score(self, member: str, tokens: Sequence[int]) -> list[float]:
        """log p(tokens[i] | tokens[:i]) for i >= 1, in nats."""
        request = GenerateRequest(tuple(tokens), {member: 1.0}, 0, prompt_logprobs=0, stream=False)
        chunks = [chunk async for chunk in self.generate(request)]
        return [entry.logprob for entry in chunks[0].prompt_logprobs]

    async def next_logprobs(self, member: str, tokens: Sequence[int]) -> np.ndarray:
        """Log-probabilities of the whole vocabulary after `tokens`; prefixes seen lately are not recomputed."""
        request = _looked_at(member, tokens)
        _check_tokens(request.tokens, self._members.source(member))
        known = await asyncio.wrap_future(self._submit(lambda: self._members.next_logits(member, request.tokens)))
        return np.asarray(await self._look(request, "next") if known is None else known.log_softmax(-1).cpu())

    async def embed(self, member: str, tokens: Sequence[int]) -> np.ndarray:
        """Mean of the last hidden states."""
        return np.asarray(await self._look(_looked_at(member, tokens), "hidden"))

    async def _look(self, request: GenerateRequest, want: Want) -> Tensor:
        """What one pass over a text finds."""
        answer = await self._begin(request, want)
        try:
            return cast(Tensor, await self._next(answer))
        finally:
            answer.cancelled = True

    async def stats(self) -> dict[str, float]:
        """Running and waiting answers, generated tokens, memory. MemberDownError once it has ended."""
        self._check_open()
        scheduler, found = self._scheduler, {"weight_bytes": 0.0, "kv_cache_bytes": 0.0, "kv_cache_used_bytes": 0.0}
        for runner in self._members.runners:
            for name, value in runner.stats().items():
                found[name] = found.get(name, 0.0) + value
        return {
            "running": float(len(scheduler.running)),
            "waiting": float(len(scheduler.waiting)),
            "generated_tokens": float(scheduler.num_generated_tokens),
            "steps": float(scheduler.num_steps),
            "preemptions": float(scheduler.num_preemptions),
            "evictions": float(self._members.num_evictions),
            "members": float(len(self._members.loaded)),
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
        self._grammars.close()
        self._changes.shutdown()  # what is under way there finds the engine closed
        for runner in self._members.runners:
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


def _looked_at(member: str, tokens: Sequence[int]) -> GenerateRequest:
    request = GenerateRequest(tuple(tokens), {member: 1.0}, 1, stream=False)
    request.check()
    return request


def _put_all(items: Sequence[tuple[Answer, Any]]) -> None:
    for answer, item in items:
        answer.mailbox.queue.put_nowait(item)


def _check_tokens(tokens: Sequence[int], source: Source, name: str = "prompt") -> None:
    """RequestError for what is no token of a member's: it must never reach a table's rows."""
    ids = np.asarray(tokens)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise RequestError(f"{name}: token ids are whole numbers", param=name)
    wrong = ids[(ids < 0) | (ids >= source.spec.vocab_size)]
    if len(wrong):
        sizes = f"the vocabulary has {source.spec.vocab_size}, from 0 on"
        raise RequestError(f"{name}: there is no token {wrong[0]}: {sizes}", param=name)
