"""How every strategy answers: window by window, by whoever is chosen for the next one, within a budget.

Before a window the strategy's `choose` says who answers with which weights. A member that fails is left out from then
on, and the others go on where it stopped, with the text as it is.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from serve.contracts import SECONDS_A_TOKEN, Call, GenerateRequest, Ledger, Member, SwarmContext, TokenChunk
from serve.strategies._account import Account, now_s
from serve.strategies._failures import Failures, SilentError, note, of_member
from serve.strategies._steps import MembersFailed, step_loop
from ulm.errors import RequestError, UlmError, UnavailableError, UnsupportedError
from ulm.models.generate import prompt_tokens, room
from ulm.models.text_stream import TextStream
from ulm.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True)
class Text:
    """A text so far, in tokens of the vocabulary that its newest part was generated in."""

    tokenizer: Tokenizer
    prompt: tuple[int, ...]
    generated: tuple[int, ...] = ()

    @property
    def tokens(self) -> tuple[int, ...]:
        """Prompt and answer."""
        return (*self.prompt, *self.generated)

    def plain(self) -> str:
        """As text."""
        return self.tokenizer.decode(self.tokens)

    def tokens_in(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Its tokens in a vocabulary that may be another."""
        is_same = tokenizer.digest == self.tokenizer.digest
        return self.tokens if is_same else tuple(prompt_tokens(tokenizer, self.plain()))


@dataclass(frozen=True)
class Chosen:
    """Who answers the next window."""

    weights: Mapping[str, float]  # none: nobody of those that were offered
    why: str


Choose = Callable[[Text, Mapping[str, Member], Account], Awaitable[Chosen]]


@dataclass
class _Answer:
    """One answer as it grows."""

    tokenizer: Tokenizer
    prompt: tuple[int, ...]
    stream: TextStream
    needs_prompt: bool  # its prompt's logprobs are still to be given
    weights: dict[str, float] = field(default_factory=dict)
    calls: dict[str, Call] = field(default_factory=dict)  # of those that answer now
    failed: set[str] = field(default_factory=set)
    generated: list[int] = field(default_factory=list)  # in the vocabulary of those that answer now
    num_tokens: int = 0  # in all
    finish_reason: str | None = None
    is_stepwise: bool = False  # each token is asked for by itself

    @property
    def text(self) -> Text:
        """Prompt and answer so far."""
        return Text(self.tokenizer, self.prompt, tuple(self.generated))

    def change_vocabulary(self, tokenizer: Tokenizer, stop: Sequence[str], *, apart: bool) -> str:
        """Go on in another vocabulary, in which all there is becomes the prompt; text that was held back until now.

        `apart`: what was generated stays apart from the prompt.
        """
        rest, said = self.stream.finish(), self.tokenizer.decode(self.generated) if apart else ""
        self.prompt = (replace(self.text, generated=()) if apart else self.text).tokens_in(tokenizer)
        self.tokenizer, self.generated = tokenizer, tokenizer.encode(said)
        self.stream = TextStream(tokenizer, stop)
        return rest


@dataclass(frozen=True)
class Drive:
    """What one answer is made with."""

    request: GenerateRequest
    members: Mapping[str, Member]
    context: SwarmContext
    account: Account
    choose: Choose
    every_tokens: int | None = None  # None: chosen once, unless somebody fails

    async def answer(self, index: int = 0) -> AsyncGenerator[TokenChunk, None]:
        """Chunks of one choice. UnavailableError where nobody can begin it."""
        request, home = self.request, next(iter(self.members.values())).tokenizer
        so_far = _Answer(
            home, request.tokens, TextStream(home, request.stop), needs_prompt=request.prompt_logprobs is not None
        )
        if request.num_top_logprobs is not None and len({m.tokenizer.digest for m in self.members.values()}) > 1:
            raise RequestError("logprobs: these members have different vocabularies", param="logprobs")
        held = [TokenChunk(Text(home, request.tokens).plain(), ())] if request.echo else []
        async with aclosing(self._windows(so_far)) as chunks:
            async for chunk in chunks:
                held.append(chunk)
                if request.stream:
                    yield replace(TokenChunk.joined(held), index=index)
                    held = []
        last = TokenChunk(so_far.stream.finish(), (), finish_reason=so_far.finish_reason)
        yield replace(TokenChunk.joined([*held, last]), index=index)

    async def _windows(self, so_far: _Answer) -> AsyncGenerator[TokenChunk, None]:
        while so_far.finish_reason is None:
            if so_far.num_tokens >= self.request.max_tokens and not so_far.needs_prompt:
                so_far.finish_reason = "length"
            elif self.account.seconds <= 0:
                self._end(so_far, "max_ms")
            elif await self._appoint(so_far):
                tokenizer = self.members[next(iter(so_far.weights))].tokenizer
                if tokenizer.digest != so_far.tokenizer.digest:
                    is_json = self.request.json_schema is not None
                    yield TokenChunk(so_far.change_vocabulary(tokenizer, self.request.stop, apart=is_json), ())
                async with aclosing(self._window(so_far)) as chunks:
                    async for chunk in chunks:
                        yield chunk

    def _end(self, so_far: _Answer, limit: str) -> None:
        """The budget's edge: the answer so far is the answer."""
        tokens = "1 token" if so_far.num_tokens == 1 else f"{so_far.num_tokens} tokens"
        self.account.note(f"ended after {tokens} by budget.{limit}")
        so_far.finish_reason = "length"

    # ---- who answers the next window

    async def _appoint(self, so_far: _Answer) -> bool:
        """Choose who answers the next window, and enter their calls; False where that ended the answer."""
        account, is_up = self.account, self.context.health.is_up
        offered = {name: m for name, m in self.members.items() if name not in so_far.failed and is_up(name)}
        try:
            async with asyncio.timeout(_finite(account.seconds)):
                chosen = await self.choose(so_far.text, offered, account)
        except TimeoutError:
            self._end(so_far, "max_ms")
            return False
        wanted = dict(chosen.weights) or {m: 1.0 for m in [m for m in self.context.fallback if m in offered][:1]}
        if not wanted:
            self._nobody(so_far)
            return False
        if not chosen.weights:
            account.note(f"answered by {next(iter(wanted))}: nobody that should answer is up")
        affordable = self._affordable(so_far, wanted, offered)
        if not affordable:
            self._end(so_far, self._limit(wanted))
            return False
        total = math.fsum(affordable.values())
        so_far.weights = {m: w / total for m, w in affordable.items()}
        tokens_in = len(so_far.text.tokens)
        so_far.calls = {
            m: so_far.calls.get(m) or account.call(m, tokens_in, chosen.why if chosen.weights else "fallback")
            for m in affordable
        }
        return True

    def _affordable(
        self, so_far: _Answer, wanted: Mapping[str, float], offered: Mapping[str, Member]
    ) -> dict[str, float]:
        """All that are wanted where the budget allows it; else those that answer now, else the heaviest of them."""
        calls, tokens = self.account.calls, self.account.tokens
        joining = [m for m in wanted if m not in so_far.calls]
        if len(joining) <= calls and len(wanted) <= tokens:
            return dict(wanted)
        limit = self._limit(wanted)
        kept = {m: w for m, w in so_far.weights.items() if m in offered}
        if kept and len(kept) <= tokens:
            self.account.note(f"members kept: budget.{limit} allows no other")
            return kept
        if so_far.num_tokens and len(wanted) > tokens:
            return {}  # the last tokens are not given to fewer members: they would be of another distribution
        picked: dict[str, float] = {}
        for member, weight in sorted(wanted.items(), key=lambda item: -item[1]):
            cost = member not in so_far.calls
            if len(picked) + 1 <= tokens and cost <= calls:
                picked[member] = weight
                calls -= cost
        if picked:
            self.account.note(f"answered by {len(picked)} of {len(wanted)} members by budget.{limit}")
        return picked

    def _limit(self, wanted: Mapping[str, float]) -> str:
        return "max_tokens" if len(wanted) > self.account.tokens else "max_calls"

    def _nobody(self, so_far: _Answer) -> None:
        """End an answer that nobody is left for; UnavailableError where it has not begun."""
        if not so_far.num_tokens:
            health = self.context.health
            wait_s = health.wait_s(m for m in self.members if m in so_far.failed or not health.is_up(m))
            why = "; ".join(self.account.ledger.degraded) or "all have failed lately"
            raise UnavailableError(f"No member can answer now ({why})", code="unavailable", retry_after_s=wait_s)
        self.account.note("cut short: no member is left to go on")
        so_far.finish_reason = "length"

    # ---- what they answer

    async def _window(self, so_far: _Answer) -> AsyncGenerator[TokenChunk, None]:
        """Chunks of one window, entered in the ledger; a member's failure is noted, and the answer goes on."""
        size, account = self._size(so_far), self.account
        if size <= 0 and not so_far.needs_prompt:  # the context is full, or the budget spent
            if account.tokens < len(so_far.weights):
                self._end(so_far, "max_tokens")
            so_far.finish_reason = "length"
            return
        asked = replace(
            self.request,
            tokens=so_far.prompt,
            generated=tuple(so_far.generated),
            weights=so_far.weights,
            max_tokens=size,
            deadline_s=_finite(account.seconds),
            # What there is counts when time is over, and what a member that fails has generated is spent.
            stream=self.request.stream or min(account.seconds, account.tokens) < math.inf,
            prompt_logprobs=self.request.prompt_logprobs if so_far.needs_prompt else None,
            echo=False,
            n=1,
            best_of=None,
        )
        patience_s = self.context.patience_s + (0 if asked.stream else SECONDS_A_TOKEN * size)
        if len({id(self.members[m].engine) for m in so_far.weights}) > 1:
            patience_s = math.inf  # the step loop has its own, and knows whom it waits for
        started_s = now_s()
        try:
            async with aclosing(self._source(asked, so_far.is_stepwise)) as chunks:  # type: ignore[type-var]
                while True:
                    left_s = account.seconds
                    async with asyncio.timeout(_finite(min(patience_s, left_s))) as limit:
                        chunk = await anext(chunks, None)
                    if chunk is None:
                        raise UlmError("ended without saying so")
                    size -= len(chunk.tokens)
                    _check(chunk, size, so_far.tokenizer.vocab_size)
                    yield self._entered(so_far, chunk)
                    if chunk.finish_reason is not None:
                        is_over = chunk.finish_reason == "stop" or size > 0  # by its context's end or its time's
                        so_far.finish_reason = chunk.finish_reason if is_over else None
                        break
        except MembersFailed as failed:
            self._lose(so_far, failed.why)
        except UnsupportedError:
            if asked.json_schema is None or so_far.is_stepwise:
                raise
            so_far.is_stepwise = True  # an engine that cannot hold an answer to a schema can say what comes next
        except Exception as error:  # noqa: BLE001  whatever it is, others may answer; a request's own error is raised
            is_ours = isinstance(error, TimeoutError) and limit.expired()  # it may be the engine's, too
            if is_ours and left_s <= patience_s:
                self._end(so_far, "max_ms")
            else:
                why = SilentError(patience_s) if is_ours else of_member(error)
                self._lose(so_far, dict.fromkeys(so_far.weights, why))
        finally:
            ms = 1e3 * (now_s() - started_s)
            for call in so_far.calls.values():
                call.ms = round(call.ms + ms, 3)

    def _size(self, so_far: _Answer) -> int:
        """Tokens of the next window. ContextLengthError where the prompt leaves no room for any."""
        speaking = [self.members[m] for m in so_far.weights]
        num_tokens = len(so_far.prompt) + len(so_far.generated)
        context_tokens = min(m.context_tokens for m in speaking)
        left = context_tokens - num_tokens
        if not so_far.num_tokens and self.request.max_tokens:
            left = room(num_tokens, context_tokens)
        sizes = [left, self.request.max_tokens - so_far.num_tokens, self.account.tokens // len(speaking)]
        if self.every_tokens is not None:
            sizes.append(self.every_tokens - so_far.num_tokens % self.every_tokens)
        return int(min(sizes))

    def _source(self, asked: GenerateRequest, is_stepwise: bool) -> AsyncIterator[TokenChunk]:
        """One engine's answer where it holds all of those that speak, else a round of questions a token."""
        speaking = {name: self.members[name] for name in asked.weights}
        engines = {id(m.engine): m.engine for m in speaking.values()}
        if len(engines) == 1 and not is_stepwise:
            return next(iter(engines.values())).generate(asked)
        if asked.prompt_logprobs is not None:
            raise UnsupportedError("prompt_logprobs need members that share an engine; ask a single member for them")
        return step_loop(asked, speaking, self.context.patience_s, self.context.grammars)

    def _entered(self, so_far: _Answer, chunk: TokenChunk) -> TokenChunk:
        """A chunk of the engine's as it is sent on; its text is decoded here, for it may go on another's."""
        self.context.health.answered(so_far.weights)
        so_far.needs_prompt = False
        so_far.generated += chunk.tokens
        so_far.num_tokens += len(chunk.tokens)
        for member, call in so_far.calls.items():
            call.add(len(chunk.tokens), so_far.weights[member])
        if chunk.degraded:
            self.account.note(chunk.degraded)
        text = "".join(so_far.stream.push(token) for token in chunk.tokens)
        return TokenChunk(text, chunk.tokens, chunk.logprobs, prompt_logprobs=chunk.prompt_logprobs)

    def _lose(self, so_far: _Answer, why: Failures) -> None:
        """Go on without members that failed."""
        note(why, self.account, self.context.health)
        so_far.failed |= why.keys()
        so_far.weights = {m: w for m, w in so_far.weights.items() if m not in why}


def _check(chunk: TokenChunk, num_left: int, vocab_size: int) -> None:
    """UlmError for what no engine may give; nothing of such a chunk is used."""
    if num_left < 0:
        raise UlmError("gave more than was asked for")
    if not all(0 <= token < vocab_size for token in chunk.tokens):
        raise UlmError(f"gave a token that is not in its vocabulary of {vocab_size}")
    if not all(math.isfinite(entry.logprob) for entry in chunk.logprobs):
        raise UlmError("gave log-probabilities that are no numbers")


def _finite(seconds: float) -> float | None:
    return None if math.isinf(seconds) else max(0.0, seconds)


async def side_by_side(answers: Sequence[AsyncGenerator[TokenChunk, None]]) -> AsyncGenerator[TokenChunk, None]:
    """Chunks of several answers as they come. The first error ends all."""
    queue: asyncio.Queue[TokenChunk | None] = asyncio.Queue()

    async def pump(chunks: AsyncGenerator[TokenChunk, None]) -> None:
        try:
            async with aclosing(chunks):
                async for chunk in chunks:
                    queue.put_nowait(chunk)
        finally:
            queue.put_nowait(None)

    tasks = [asyncio.create_task(pump(chunks)) for chunks in answers]
    try:
        ended = 0
        while ended < len(tasks):
            chunk = await queue.get()
            if chunk is not None:
                yield chunk
                continue
            ended += 1
            for task in tasks:
                if task.done():
                    task.result()
        await asyncio.gather(*tasks)
    finally:  # a client that has left ends all of it
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def choices(drive: Drive) -> AsyncIterator[TokenChunk | Ledger]:
    """All choices of a request, each chosen for and weighed by itself, with an equal part of the budget; the Ledger."""
    request, ledger = drive.request, drive.account.ledger
    number = request.num_choices
    if number == 1:
        async with aclosing(drive.answer()) as chunks:
            async for chunk in chunks:
                yield _marked(chunk, ledger)
        yield ledger
        return
    ranked = number > request.n
    num_top = request.num_top_logprobs
    drives = [
        replace(
            drive,
            account=account,
            request=replace(
                request,
                n=1,
                best_of=None,
                sampling=request.sampling.choice(index),
                num_top_logprobs=0 if ranked and num_top is None else num_top,
                prompt_logprobs=None if index else request.prompt_logprobs,
            ),
        )
        for index, account in enumerate(drive.account.shares(number))
    ]
    answers = [one.answer(index) for index, one in enumerate(drives)]
    if not ranked:
        async with aclosing(side_by_side(answers)) as chunks:
            async for chunk in chunks:
                yield chunk
    else:
        async with aclosing(side_by_side(answers)) as chunks:
            found = TokenChunk.by_choice([chunk async for chunk in chunks])
        of_prompt = next(chunk.prompt_logprobs for chunk in found if chunk.index == 0)
        found.sort(key=lambda c: (-sum(e.logprob for e in c.logprobs) / max(1, len(c.logprobs)), c.index))
        ledger.num_discarded += sum(len(chunk.tokens) for chunk in found[request.n :])
        for index, chunk in enumerate(found[: request.n]):
            logprobs = () if num_top is None else chunk.logprobs
            yield replace(chunk, index=index, logprobs=logprobs, prompt_logprobs=() if index else of_prompt)
    yield ledger


def _marked(chunk: TokenChunk, ledger: Ledger) -> TokenChunk:
    """The last chunk says, like the ledger, what was not done as asked."""
    return replace(chunk, degraded="; ".join(ledger.degraded) or None) if chunk.finish_reason else chunk


def in_order(names: Sequence[str]) -> Choose:
    """Choose the first of these that is offered."""

    async def choose(text: Text, offered: Mapping[str, Member], account: Account) -> Chosen:
        found = [name for name in names if name in offered][:1]
        return Chosen(dict.fromkeys(found, 1.0), "asked" if found == list(names[:1]) else "fallback")

    return choose
