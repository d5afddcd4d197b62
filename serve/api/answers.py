"""OpenAI's answers: how chunks and a ledger become JSON, whole or streamed, for completions and for chats."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from serve.contracts import Ledger, TokenChunk, TokenLogprob
from ulm.tokenizers.tokenizer import Tokenizer


@dataclass
class Choice:
    """One answer as it grows."""

    index: int
    text: str = ""
    num_tokens: int = 0
    finish_reason: str | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)

    def add(self, chunk: TokenChunk) -> None:
        """Take in a chunk."""
        self.text += chunk.text
        self.num_tokens += len(chunk.tokens)
        self.logprobs += chunk.logprobs
        self.finish_reason = chunk.finish_reason or self.finish_reason


class Choices:
    """All answers to the prompts of a body, which come one prompt after another; of some strategies several to each."""

    def __init__(self, num_prompt_tokens: Sequence[int]) -> None:
        self.num_prompt_tokens = sum(num_prompt_tokens)
        self._first = {0: 0}  # by prompt: OpenAI's index of its first choice
        self._found: dict[int, Choice] = {}

    def find(self, prompt: int, index: int) -> tuple[Choice, bool]:
        """The choice of that index among those of its prompt, and whether it is new."""
        first = self._first.setdefault(prompt, len(self._found))
        is_new = first + index not in self._found
        return self._found.setdefault(first + index, Choice(first + index)), is_new

    @property
    def listed(self) -> list[Choice]:
        """In OpenAI's order."""
        return [self._found[index] for index in sorted(self._found)]

    @property
    def num_tokens(self) -> int:
        """Generated tokens, of all choices."""
        return sum(choice.num_tokens for choice in self._found.values())


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
    """What differs between completions and chat completions; one object shapes one response."""

    object_name: str
    chunk_name: str
    prefix: str

    def __init__(self, model: str, tokenizer: Tokenizer, wants_logprobs: bool) -> None:
        self._tokenizer, self._wants_logprobs = tokenizer, wants_logprobs
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, choices: Choices, ledger: Ledger) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        listed = [self._choice(choice) for choice in choices.listed]
        return {
            **self._head,
            "object": self.object_name,
            "choices": listed,
            "usage": usage(choices),
            "ulm": ledger_json(ledger),
        }

    def piece(self, chunk: TokenChunk, before: Choice) -> dict[str, Any]:
        """A streamed chunk; `before` is the choice without it."""
        return {**self._head, "object": self.chunk_name, "choices": [self._delta(chunk, before)]}

    def tail(self, choices: Choices) -> dict[str, Any]:
        """The usage chunk that ends a stream on request."""
        return {**self._head, "object": self.chunk_name, "choices": [], "usage": usage(choices)}

    def opening(self, index: int) -> dict[str, Any] | None:
        """A chunk before a choice's first token, where the shape has one."""
        return None

    @abstractmethod
    def _choice(self, choice: Choice) -> dict[str, Any]: ...

    @abstractmethod
    def _delta(self, chunk: TokenChunk, before: Choice) -> dict[str, Any]: ...

    def _token(self, token: int) -> str:
        return self._tokenizer.decode([token])


class CompletionShape(Shape):
    """text_completion."""

    object_name = chunk_name = "text_completion"
    prefix = "cmpl"

    def _choice(self, choice: Choice) -> dict[str, Any]:
        logprobs = self._logprobs(choice.logprobs, 0)
        return {
            "index": choice.index,
            "text": choice.text,
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason,
        }

    def _delta(self, chunk: TokenChunk, before: Choice) -> dict[str, Any]:
        offset = sum(len(self._token(entry.token)) for entry in before.logprobs)
        logprobs = self._logprobs(chunk.logprobs, offset)
        return {"index": before.index, "text": chunk.text, "logprobs": logprobs, "finish_reason": chunk.finish_reason}

    def _logprobs(self, entries: Sequence[TokenLogprob], offset: int) -> dict[str, Any] | None:
        if not self._wants_logprobs:
            return None
        tokens = [self._token(entry.token) for entry in entries]
        offsets = [offset + sum(map(len, tokens[:i])) for i in range(len(tokens))]
        return {
            "tokens": tokens,
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [self._top(entry) for entry in entries],
            "text_offset": offsets,
        }

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        table: dict[str, float] = {}
        for token, logprob in (*entry.top, (entry.token, entry.logprob)):
            table.setdefault(self._token(token), logprob)  # two tokens may be one text; the likelier stands
        return table


class ChatShape(Shape):
    """chat.completion."""

    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"
    prefix = "chatcmpl"

    def opening(self, index: int) -> dict[str, Any] | None:
        """The role comes first."""
        delta = {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return {**self._head, "object": self.chunk_name, "choices": [delta]}

    def _choice(self, choice: Choice) -> dict[str, Any]:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        logprobs = self._logprobs(choice.logprobs)
        return {"index": choice.index, "message": message, "logprobs": logprobs, "finish_reason": choice.finish_reason}

    def _delta(self, chunk: TokenChunk, before: Choice) -> dict[str, Any]:
        delta = {"content": chunk.text} if chunk.text or not chunk.finish_reason else {}
        logprobs = self._logprobs(chunk.logprobs)
        return {"index": before.index, "delta": delta, "logprobs": logprobs, "finish_reason": chunk.finish_reason}

    def _logprobs(self, entries: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self._wants_logprobs:
            return None
        return {
            "content": [
                {
                    **self._entry(entry.token, entry.logprob),
                    "top_logprobs": [self._entry(token, logprob) for token, logprob in entry.top],
                }
                for entry in entries
            ],
            "refusal": None,
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._token(token),
            "logprob": logprob,
            "bytes": list(self._tokenizer.token_bytes[token]),
        }
