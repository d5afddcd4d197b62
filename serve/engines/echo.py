"""An engine without a model: it says the prompt again and again. For tests, and for loads that no model bounds.

Its next token is a function of the whole text, so that answers, log-probabilities and scores agree, and an answer may
be interrupted anywhere: the shortest period of the text goes on. A prompt is so repeated in a circle; one that ends as
it begins overlaps itself there. An end-of-text token ends an answer, unless it leads the text.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

import numpy as np
from pydantic import Field

from serve.contracts import GenerateRequest, MemberInfo, TokenChunk, TokenLogprob
from ulm import runtime
from ulm.checkpoints import store
from ulm.checkpoints.manifest import read_manifest
from ulm.errors import MemberDownError, ModelNotFoundError, RequestError, UnsupportedError
from ulm.models.account import num_parameters, on_meta
from ulm.models.generate import room
from ulm.models.text_stream import TextStream
from ulm.registry import KindConfig, register
from ulm.tokenizers.tokenizer import Tokenizer

ELSEWHERE = 1e-6  # the probability of all tokens together that do not come next: their log-probabilities are finite
EMBEDDING_WIDTH = 16


class Config(KindConfig):
    """`delay_ms` of waiting before each token of an answer, and before each other reply."""

    delay_ms: float = Field(0.0, ge=0)


@dataclass(frozen=True)
class _Member:
    """What is read of a checkpoint: all but its weights."""

    tokenizer: Tokenizer
    info: MemberInfo


@register("engine", Config)
class EchoEngine:
    """Members differ in tokenizer and context alone. Sampling and weights change nothing."""

    def __init__(self, config: Config) -> None:
        self._delay_s = config.delay_ms / 1e3
        self._members: dict[str, _Member] = {}
        self._is_closed = False
        self._num_running = self._num_generated = 0

    # ---- members

    async def members(self) -> dict[str, MemberInfo]:
        """What is loaded now."""
        self._check_open()
        return {name: member.info for name, member in self._members.items()}

    async def load(self, member: str, checkpoint: str) -> MemberInfo:
        """Read a checkpoint's spec and tokenizer."""
        self._check_open()
        self._members[member] = await asyncio.to_thread(_read, checkpoint)
        return self._members[member].info

    async def unload(self, member: str) -> None:
        """Forget a member; answers under way are finished."""
        self._member(member)
        del self._members[member]

    async def reload(self, member: str, checkpoint: str) -> MemberInfo:
        """The same as `load`, for a member that is there."""
        self._member(member)
        return await self.load(member, checkpoint)

    def _check_open(self) -> None:
        if self._is_closed:
            raise MemberDownError("the engine was closed")

    def _member(self, name: str) -> _Member:
        self._check_open()
        if name not in self._members:
            raise ModelNotFoundError(f"The engine has no member {name!r}", code="model_not_found")
        return self._members[name]

    # ---- answers

    async def generate(self, request: GenerateRequest) -> AsyncIterator[TokenChunk]:
        """Chunks of an answer, a token a chunk in a stream; the choices go on side by side, all with the same text."""
        request.check()
        if request.json_schema is not None:
            raise UnsupportedError("json_schema: the echo engine says its prompt; a member of the local engine does")
        members = [self._member(name) for name, weight in request.weights.items() if weight > 0]
        tokenizer, known = members[0].tokenizer, (*request.tokens, *request.generated)
        if len({member.tokenizer.digest for member in members}) > 1:
            raise UnsupportedError("members of one mixture must share a tokenizer")
        _check_tokens(known, tokenizer.vocab_size)
        request.sampling.check(tokenizer.vocab_size)
        context_tokens = min(member.info.context_tokens for member in members)
        max_tokens = min(request.max_tokens, room(len(known) - (not request.max_tokens), context_tokens))
        self._num_running += 1
        held = [_prompt(request, tokenizer)]
        try:
            async with aclosing(self._chunks(request, known, tokenizer, max_tokens)) as chunks:
                async for chunk in chunks:
                    held.append(chunk)
                    if not (request.stream or chunk.finish_reason):
                        continue
                    whole = TokenChunk.joined(held)
                    for index in range(request.n):
                        yield replace(
                            whole,
                            index=index,
                            prompt_logprobs=() if index else whole.prompt_logprobs,
                            degraded=whole.degraded if index == request.n - 1 else None,
                        )
                    held = []
        finally:
            self._num_running -= 1

    async def _chunks(
        self, request: GenerateRequest, known: Sequence[int], tokenizer: Tokenizer, max_tokens: int
    ) -> AsyncGenerator[TokenChunk, None]:
        """One choice, token by token; the last chunk says why it ended."""
        stream, loop = TextStream(tokenizer, request.stop), asyncio.get_running_loop()
        for token in request.generated:
            stream.push(token)
        due_s = math.inf if request.deadline_s is None else loop.time() + request.deadline_s
        following = _following(known, tokenizer.eot_id)
        for number in range(max_tokens):
            if loop.time() > due_s:
                yield TokenChunk(stream.finish(), (), finish_reason="length", degraded="ended by its deadline")
                return
            await self._wait()
            token = following[number % len(following)]
            if token == tokenizer.eot_id:
                yield TokenChunk(stream.finish(), (), finish_reason="stop")
                return
            self._num_generated += request.n
            text = stream.push(token)
            entries: tuple[TokenLogprob, ...] = ()
            if request.num_top_logprobs is not None:
                entries = (_entry(token, token, request.num_top_logprobs, tokenizer.vocab_size),)
            if stream.stopped:
                yield TokenChunk(text, (token,), entries, "stop")
                return
            yield TokenChunk(text, (token,), entries)
        yield TokenChunk(stream.finish(), (), finish_reason="length")

    async def _wait(self) -> None:
        if self._delay_s:
            await asyncio.sleep(self._delay_s)
        self._check_open()

    async def score(self, member: str, tokens: Sequence[int]) -> list[float]:
        """log p(tokens[i] | tokens[:i]) for i >= 1, in nats."""
        tokenizer = await self._asked(member, tokens)
        said = _followers(tokens, tokenizer.eot_id)
        size = tokenizer.vocab_size
        return [_entry(token, next_, 0, size).logprob for next_, token in zip(said, tokens[1:], strict=False)]

    async def next_logprobs(self, member: str, tokens: Sequence[int]) -> np.ndarray:
        """Nearly all probability for the token that an answer would go on with."""
        tokenizer = await self._asked(member, tokens)
        logprobs_V = np.full(tokenizer.vocab_size, _elsewhere(tokenizer.vocab_size), dtype=np.float32)
        logprobs_V[_followers(tokens, tokenizer.eot_id)[-1]] = math.log1p(-ELSEWHERE)
        return logprobs_V

    async def embed(self, member: str, tokens: Sequence[int]) -> np.ndarray:
        """Shares of tokens by their remainder, float32 of a fixed width."""
        await self._asked(member, tokens)
        counts_D = np.bincount(np.asarray(tokens) % EMBEDDING_WIDTH, minlength=EMBEDDING_WIDTH)
        return (counts_D / len(tokens)).astype(np.float32)

    async def _asked(self, member: str, tokens: Sequence[int]) -> Tokenizer:
        """The tokenizer of a member that is asked about a text, after the delay."""
        found = self._member(member)
        GenerateRequest(tuple(tokens), {member: 1.0}, 1).check()
        _check_tokens(tokens, found.tokenizer.vocab_size)
        room(len(tokens) - 1, found.info.context_tokens)
        await self._wait()
        return found.tokenizer

    async def stats(self) -> dict[str, float]:
        """Running answers, generated tokens, memory; nobody ever waits for another."""
        self._check_open()
        return {
            "running": float(self._num_running),
            "waiting": 0.0,
            "generated_tokens": float(self._num_generated),
            "members": float(len(self._members)),
            "resident_bytes": float(runtime.rss_bytes()),
        }

    async def close(self) -> None:
        """End; answers under way fail with their next token."""
        self._is_closed = True


def _read(checkpoint: str) -> _Member:
    path = store.resolve(checkpoint, root=runtime.root())
    spec = store.read_spec(path)
    digest, size = read_manifest(path).digest, num_parameters(on_meta(spec))
    return _Member(
        store.read_tokenizer(path), MemberInfo(str(path), digest, spec.context_tokens, spec.vocab_size, size)
    )


def _borders(tokens: Sequence[int]) -> list[int]:
    """For each prefix the length of the longest one that it both begins and ends with, itself left out."""
    borders: list[int] = []
    border = 0
    for at, token in enumerate(tokens):
        if at:
            while border and tokens[border] != token:
                border = borders[border - 1]
            border += tokens[border] == token
        borders.append(border)
    return borders


def _followers(tokens: Sequence[int], eot_id: int) -> list[int]:
    """The token that comes next after each prefix: of a text of L tokens with period q that at L - q."""
    text = tokens[1:] if tokens[0] == eot_id else tokens
    return [eot_id] * (len(tokens) - len(text)) + [text[border] for border in _borders(text)]


def _following(tokens: Sequence[int], eot_id: int) -> list[int]:
    """The tokens that come next, to be repeated for ever; a text of nothing ends at once."""
    text = tokens[1:] if tokens[0] == eot_id else tokens
    if not text:
        return [eot_id]
    border = _borders(text)[-1]
    return [*text[border:]]


def _elsewhere(vocab_size: int) -> float:
    return math.log(ELSEWHERE / (vocab_size - 1))


def _entry(token: int, said: int, num_top: int, vocab_size: int) -> TokenLogprob:
    """A token's log-probability where `said` comes next; of the others, all equally likely, the first are named."""
    likely, other = math.log1p(-ELSEWHERE), _elsewhere(vocab_size)
    others = [(n, other) for n in range(min(num_top, vocab_size)) if n != said]
    top = [(said, likely), *others][:num_top]
    return TokenLogprob(token, likely if token == said else other, tuple(top))


def _prompt(request: GenerateRequest, tokenizer: Tokenizer) -> TokenChunk:
    """What a request wants of its prompt: text and log-probabilities, before its first token."""
    tokens, num_top = request.tokens, request.prompt_logprobs
    text = tokenizer.decode(tokens[1:] if tokens[0] == tokenizer.eot_id else tokens) if request.echo else ""
    if num_top is None:
        return TokenChunk(text, ())
    told = zip(tokens[1:], _followers(tokens, tokenizer.eot_id), strict=False)
    entries = tuple(_entry(token, said, num_top, tokenizer.vocab_size) for token, said in told)
    return TokenChunk(text, (), prompt_logprobs=entries)


def _check_tokens(tokens: Sequence[int], vocab_size: int) -> None:
    wrong = [token for token in tokens if not 0 <= token < vocab_size]
    if wrong:
        raise RequestError(f"prompt: there is no token {wrong[0]}: the vocabulary has {vocab_size}", param="prompt")
