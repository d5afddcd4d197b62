"""vLLM's outputs as the chunks of an answer.

Text is decoded by the member's own tokenizer, token by token, so that stop strings and characters that lie across
tokens are what they are in every engine. Log-probabilities are the model's own: nothing penalised or cut.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from serve.constrained import Constraint, refusal
from serve.contracts import GenerateRequest, TokenChunk, TokenLogprob
from ulm.errors import RequestError, UlmError
from ulm.models.text_stream import TextStream
from ulm.tokenizers.tokenizer import Tokenizer

LATE = "ended by its deadline"


@dataclass
class _Choice:
    """One continuation, and what of it was not sent yet."""

    index: int
    stream: TextStream
    constraint: Constraint | None = None
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    num_tokens: int = 0
    logprob_sum: float = 0.0
    is_sent: bool = False  # its end, too

    @property
    def has_news(self) -> bool:
        """Whether there is something to send."""
        return bool(self.text or self.tokens or (self.finish_reason and not self.is_sent))

    def end(self, reason: str) -> None:
        """No more tokens come."""
        self.finish_reason = reason
        self.text += self.stream.finish()

    def take_chunk(self, index: int) -> TokenChunk:
        """All that was not sent yet."""
        chunk = TokenChunk(self.text, tuple(self.tokens), tuple(self.logprobs), self.finish_reason, index=index)
        self.text, self.tokens, self.logprobs, self.is_sent = "", [], [], self.finish_reason is not None
        return chunk


class Answer:
    """All choices of one request."""

    def __init__(
        self, request: GenerateRequest, tokenizer: Tokenizer, text: str, constraint: Constraint | None = None
    ) -> None:
        """`text` is what each choice begins with, `constraint` that of a choice without tokens."""
        self._request, self._tokenizer = request, tokenizer
        self._choices = [
            _Choice(index, _stream(request, tokenizer), constraint and constraint.copy(), text)
            for index in range(request.num_choices)
        ]

    @property
    def num_tokens(self) -> int:
        """That were generated for it, also for choices that are not given."""
        return sum(choice.num_tokens for choice in self._choices)

    async def chunks(self, outputs: AsyncGenerator[Any, None]) -> AsyncGenerator[TokenChunk, None]:
        """What vLLM brings, as it comes or, where nobody reads along, at the end; a deadline ends what there is."""
        request, choices = self._request, self._choices
        due_s = math.inf if request.deadline_s is None else _now_s() + request.deadline_s
        prompt: tuple[TokenLogprob, ...] = ()
        degraded: str | None = None
        while any(choice.finish_reason is None for choice in choices):
            try:
                async with asyncio.timeout(None if due_s == math.inf else max(0.0, due_s - _now_s())) as limit:
                    output = await anext(outputs, None)
            except TimeoutError:
                if not limit.expired():
                    raise
                degraded = LATE
                for choice in choices:
                    if choice.finish_reason is None:
                        choice.end("length")
                break
            if output is None:
                raise UlmError("vLLM ended an answer without saying so")
            if request.prompt_logprobs is not None and output.prompt_logprobs:
                found = output.prompt_logprobs[1:]
                prompt = entries_of(request.tokens[1:], found, request.prompt_logprobs)
            touched = [choices[completion.index] for completion in output.outputs]
            for choice, completion in zip(touched, output.outputs, strict=True):
                self._take(choice, completion)
            if request.stream and any(choice.finish_reason is None for choice in choices):
                for choice in touched:
                    if choice.has_news:
                        yield replace(choice.take_chunk(choice.index), prompt_logprobs=prompt)
                        prompt = ()
            if output.finished:
                await anext(outputs, None)  # to its end: closed before, vLLM would be told to abort it
        rest = [(index, c) for index, c in enumerate(_best(choices, request.n)) if c.has_news]
        for index, choice in rest:
            remark = degraded if choice is rest[-1][1] else None
            yield replace(choice.take_chunk(index), prompt_logprobs=prompt, degraded=remark)
            prompt = ()

    def _take(self, choice: _Choice, completion: Any) -> None:
        """What came of a choice, up to its end."""
        num_top = self._request.num_top_logprobs
        if choice.finish_reason is not None:  # by a stop string: vLLM goes on until all choices have ended
            return
        for place, token in enumerate(completion.token_ids):
            if token == self._tokenizer.eot_id:
                break
            choice.tokens.append(token)
            choice.num_tokens += 1
            if completion.logprobs is not None:
                entry = _entry(token, completion.logprobs[place], num_top or 0)
                choice.logprob_sum += entry.logprob
                if num_top is not None:
                    choice.logprobs.append(entry)
            choice.text += choice.stream.push(token)
            if choice.stream.stopped:
                choice.finish_reason = "stop"
                return
            if choice.constraint is not None:
                choice.constraint.append(token)
                if choice.constraint.is_whole:
                    choice.end("stop")
                    return
        if completion.finish_reason == "stop" and choice.constraint is not None and not choice.constraint.may_end:
            raise refusal("is too complex to be followed further by vllm")
        if completion.finish_reason in ("stop", "length"):
            choice.end(completion.finish_reason)
        elif completion.finish_reason is not None:
            raise UlmError(f"vLLM ended an answer by {completion.finish_reason}")


def _stream(request: GenerateRequest, tokenizer: Tokenizer) -> TextStream:
    """The text of an answer; what was sent of it before belongs to nobody, what was held back to what follows."""
    stream = TextStream(tokenizer, request.stop)
    for token in request.generated:
        stream.push(token)
    if stream.stopped:
        raise RequestError("generated: this answer has ended, with a stop string", param="generated")
    return stream


def echo(request: GenerateRequest, tokenizer: Tokenizer) -> str:
    """What an answer begins with where the request asks for its prompt."""
    tokens = request.tokens
    return tokenizer.decode(tokens[1:] if tokens[0] == tokenizer.eot_id else tokens) if request.echo else ""


def _entry(token: int, found: Mapping[int, Any], num_top: int) -> TokenLogprob:
    """A token's entry, from vLLM's mapping of it and the likeliest tokens; of equal ones the lower id comes first."""
    top = sorted(((id_, at.logprob) for id_, at in found.items()), key=lambda pair: (-pair[1], pair[0]))
    return TokenLogprob(token, found[token].logprob, tuple(top[:num_top]))


def entries_of(tokens: Sequence[int], found: Sequence[Any], num_top: int) -> tuple[TokenLogprob, ...]:
    """The entries of tokens, from vLLM's mapping at each."""
    return tuple(_entry(token, at, num_top) for token, at in zip(tokens, found, strict=True))


def _best(choices: list[_Choice], n: int) -> list[_Choice]:
    """The choices to give: all, or of more than n those whose tokens are likeliest on average, likeliest first."""
    if len(choices) <= n:
        return choices
    ranked = sorted(choices, key=lambda c: (-c.logprob_sum / max(1, c.num_tokens), c.index))
    return ranked[:n]


def _now_s() -> float:
    return asyncio.get_running_loop().time()
