"""OpenAI's answers: how chunks and a ledger become JSON, whole or streamed, for completions and for chats."""

from __future__ import annotations

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import Any

from serve.api.refusals import error_body
from serve.api.schema import ChoicesBody, CompletionBody, GenerationBody
from serve.contracts import Ledger, TokenChunk, TokenLogprob
from ulm.tokenizers.tokenizer import Tokenizer

DONE = "data: [DONE]\n\n"


@dataclass
class Prompt:
    """A prompt of a body."""

    tokens: Sequence[int]
    logprobs: tuple[TokenLogprob, ...] = ()  # of tokens 1, 2, …, by whoever gave them first


@dataclass
class Choice:
    """One answer as it grows."""

    index: int
    prompt: Prompt
    text: str = ""
    num_tokens: int = 0
    finish_reason: str | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    of_prompt: tuple[TokenLogprob, ...] = ()  # where its own are given

    @property
    def prompt_logprobs(self) -> tuple[TokenLogprob, ...]:
        """Of the prompt's tokens 1, 2, …, where they were asked for."""
        return self.of_prompt or self.prompt.logprobs

    def add(self, chunk: TokenChunk) -> None:
        """Take in a chunk."""
        self.text += chunk.text
        self.num_tokens += len(chunk.tokens)
        self.of_prompt = self.of_prompt or chunk.prompt_logprobs
        self.prompt.logprobs = self.prompt.logprobs or chunk.prompt_logprobs
        self.logprobs += chunk.logprobs
        self.finish_reason = chunk.finish_reason or self.finish_reason


class Choices:
    """All answers to the prompts of a body, which come one prompt after another; of some strategies several to each."""

    def __init__(self, prompts: Sequence[Sequence[int]]) -> None:
        self._prompts = [Prompt(tokens) for tokens in prompts]
        self._first = {0: 0}  # by prompt: OpenAI's index of its first choice
        self._found: dict[int, Choice] = {}
        self.num_discarded = 0  # tokens of choices that best_of had drawn beside these

    def find(self, prompt: int, index: int) -> tuple[Choice, bool]:
        """The choice of that index among those of its prompt, and whether it is new."""
        first = self._first.setdefault(prompt, len(self._found))
        is_new = first + index not in self._found
        return self._found.setdefault(first + index, Choice(first + index, self._prompts[prompt])), is_new

    @property
    def listed(self) -> list[Choice]:
        """In OpenAI's order."""
        return [self._found[index] for index in sorted(self._found)]

    @property
    def num_prompt_tokens(self) -> int:
        """Of all prompts, each once."""
        return sum(len(prompt.tokens) for prompt in self._prompts)

    @property
    def num_tokens(self) -> int:
        """Generated tokens, of all choices and those that were drawn beside them."""
        return self.num_discarded + sum(choice.num_tokens for choice in self._found.values())

    @property
    def total_tokens(self) -> int:
        """Both."""
        return self.num_prompt_tokens + self.num_tokens


def usage(choices: Choices) -> dict[str, int]:
    """Tokens in, once for each prompt, and out, of all choices."""
    tokens_in, tokens_out = choices.num_prompt_tokens, choices.num_tokens
    return {"prompt_tokens": tokens_in, "completion_tokens": tokens_out, "total_tokens": tokens_in + tokens_out}


def ledger_json(ledger: Ledger) -> dict[str, Any]:
    """The field `ulm`."""
    budget = ledger.budget.model_dump(exclude_none=True)
    calls = [{**asdict(call), "weight": round(call.weight, 6)} for call in ledger.calls]
    return {"strategy": ledger.strategy, "calls": calls, "budget": budget, "degraded": ledger.degraded}


class Shape(ABC):
    """What differs between OpenAI's kinds of answer; one object shapes one response."""

    def __init__(self, body: GenerationBody, tokenizer: Tokenizer) -> None:
        self._body, self._tokenizer = body, tokenizer
        self._wants_logprobs = body.num_top_logprobs is not None

    @abstractmethod
    def whole(self, choices: Choices, ledger: Ledger) -> dict[str, Any]:
        """The body of an answer that is not streamed."""

    @abstractmethod
    def begin(self) -> Iterator[str]:
        """Events before the first chunk."""

    @abstractmethod
    def add(self, chunk: TokenChunk, before: Choice, is_new: bool) -> Iterator[str]:
        """Events of a chunk; `before` is its choice without it, `is_new` if this is its first."""

    @abstractmethod
    def end(self, choices: Choices, ledger: Ledger) -> Iterator[str]:
        """Events after the last chunk."""

    def failed(self, message: str) -> str:
        """An error after the stream has begun: there it can only be an event."""
        return event(error_body(message, "server_error"))

    def _token(self, token: int) -> str:
        return self._tokenizer.decode([token])

    def _entries(self, entries: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
        """As chats and responses have them; none where they were not asked for."""
        if not self._wants_logprobs:
            return []
        return [
            {
                **self._entry(entry.token, entry.logprob),
                "top_logprobs": [self._entry(token, logprob) for token, logprob in entry.top],
            }
            for entry in entries
        ]

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._token(token),
            "logprob": logprob,
            "bytes": list(self._tokenizer.token_bytes[token]),
        }


class ChunkedShape(Shape):
    """Completions and chat completions: a stream of chunks of choices."""

    object_name: str
    chunk_name: str
    prefix: str
    _body: ChoicesBody

    def __init__(self, body: ChoicesBody, tokenizer: Tokenizer) -> None:
        super().__init__(body, tokenizer)
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
        self._held: dict[str, Any] | None = None  # the last chunk that ended a choice: the ledger may belong on it

    def whole(self, choices: Choices, ledger: Ledger) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        listed = [self._choice(choice) for choice in choices.listed]
        more = {"usage": usage(choices), "ulm": ledger_json(ledger)}
        return {**self._head, "object": self.object_name, "choices": listed, **more}

    def begin(self) -> Iterator[str]:
        """Nothing."""
        return iter(())

    def add(self, chunk: TokenChunk, before: Choice, is_new: bool) -> Iterator[str]:
        """A chunk, if it has anything to tell; one that ends its choice waits for what follows it."""
        if self._held is not None:
            yield event(self._held)
            self._held = None
        if is_new and (opening := self._opening(before.index)) is not None:
            yield event(self._chunk([opening]))
        piece = self._chunk([self._delta(chunk, before, is_new)])
        if chunk.finish_reason is not None:
            self._held = piece
        elif chunk.text or chunk.logprobs or chunk.prompt_logprobs:
            yield event(piece)

    def end(self, choices: Choices, ledger: Ledger) -> Iterator[str]:
        """The last chunk, with the ledger where no usage follows."""
        account = {"ulm": ledger_json(ledger)}
        if self._held is not None:
            yield event(self._held if self._body.include_usage else {**self._held, **account})
        if self._body.include_usage:
            yield event({**self._chunk([]), "usage": usage(choices), **account})
        yield DONE

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": self.chunk_name, "choices": choices}

    def _opening(self, index: int) -> dict[str, Any] | None:
        """What comes before a choice's first token, where the shape has something."""
        return None

    @abstractmethod
    def _choice(self, choice: Choice) -> dict[str, Any]: ...

    @abstractmethod
    def _delta(self, chunk: TokenChunk, before: Choice, is_new: bool) -> dict[str, Any]: ...


class CompletionShape(ChunkedShape):
    """text_completion."""

    object_name = chunk_name = "text_completion"
    prefix = "cmpl"
    _body: CompletionBody

    def _choice(self, choice: Choice) -> dict[str, Any]:
        logprobs = self._logprobs([*self._echoed(choice.prompt, choice.prompt_logprobs), *choice.logprobs], 0)
        return {
            "index": choice.index,
            "text": choice.text,
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason,
        }

    def _delta(self, chunk: TokenChunk, before: Choice, is_new: bool) -> dict[str, Any]:
        echoed = self._echoed(before.prompt, chunk.prompt_logprobs if is_new else before.prompt_logprobs)
        offset = 0 if is_new else self._length([*echoed, *before.logprobs])
        logprobs = self._logprobs([*echoed, *chunk.logprobs] if is_new else chunk.logprobs, offset)
        return {"index": before.index, "text": chunk.text, "logprobs": logprobs, "finish_reason": chunk.finish_reason}

    def _echoed(self, prompt: Prompt, logprobs: Sequence[TokenLogprob]) -> list[TokenLogprob | int]:
        """Entries of an echoed prompt's tokens; its very first has only itself, for nothing stands before it.

        The <|endoftext|> that we put before a text is not listed: clients count the tokens that they gave.
        """
        if not (self._wants_logprobs and self._body.echo):
            return []
        return [*(prompt.tokens[:1] if self._body.gives_tokens else ()), *logprobs]

    def _length(self, entries: Sequence[TokenLogprob | int]) -> int:
        return sum(len(self._token(_id(entry))) for entry in entries)

    def _logprobs(self, entries: Sequence[TokenLogprob | int], offset: int) -> dict[str, Any] | None:
        if not self._wants_logprobs:
            return None
        tokens = [self._token(_id(entry)) for entry in entries]
        return {
            "tokens": tokens,
            "token_logprobs": [None if isinstance(entry, int) else entry.logprob for entry in entries],
            "top_logprobs": [None if isinstance(entry, int) else self._top(entry) for entry in entries],
            "text_offset": [offset + length for length in accumulate(map(len, tokens[:-1]), initial=0)][: len(tokens)],
        }

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        table: dict[str, float] = {}
        for token, logprob in (*entry.top, (entry.token, entry.logprob)):
            table.setdefault(self._token(token), logprob)  # two tokens may be one text; the likelier stands
        return table


class ChatShape(ChunkedShape):
    """chat.completion."""

    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"
    prefix = "chatcmpl"

    def _opening(self, index: int) -> dict[str, Any] | None:
        """The role comes first."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _choice(self, choice: Choice) -> dict[str, Any]:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        logprobs = self._logprobs(choice.logprobs)
        return {"index": choice.index, "message": message, "logprobs": logprobs, "finish_reason": choice.finish_reason}

    def _delta(self, chunk: TokenChunk, before: Choice, is_new: bool) -> dict[str, Any]:
        delta = {"content": chunk.text} if chunk.text or not chunk.finish_reason else {}
        logprobs = self._logprobs(chunk.logprobs)
        return {"index": before.index, "delta": delta, "logprobs": logprobs, "finish_reason": chunk.finish_reason}

    def _logprobs(self, entries: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self._wants_logprobs:
            return None
        return {"content": self._entries(entries), "refusal": None}


def event(value: Mapping[str, Any], name: str | None = None) -> str:
    """A server-sent event."""
    data = f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
    return f"event: {name}\n{data}" if name else data


def _id(entry: TokenLogprob | int) -> int:
    return entry if isinstance(entry, int) else entry.token
