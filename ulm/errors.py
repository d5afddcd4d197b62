"""Every error a user can meet, as one tree.

UlmError
├── ConfigError            a recipe, an option or a path is wrong: place, problem, remedy (exit 2)
│   └── UnknownKindError   no such implementation in a slot
├── ArtefactError          a corpus, checkpoint, clustering or swarm is missing, foreign or damaged
├── CorpusError            a corpus could not be built from the sources it was given
├── TrainingError          training cannot go on (the loss is not finite, a worker is lost)
├── UnsupportedError       an engine or a kind cannot do what was asked
├── ClusterError           Ray or a port is not to be had
├── MemberDownError        an engine is gone or does not answer; strategies go on without its members
└── RequestError           a request to the endpoint is refused; carries OpenAI's status, type and code
    ├── ContextLengthError     prompt longer than the model's context
    ├── ModelNotFoundError     no such model at this endpoint
    ├── InvalidKeyError        no API key, or one that is not valid
    ├── ScopeError             the key may not do that
    ├── RateLimitError         the key has had its share of this minute
    ├── QuotaError             what is left of the key's quota is not enough
    ├── OverloadedError        too many requests are waiting already: ask again later
    │   └── UnavailableError   no member that could answer is up: ask again later
    └── UnknownCharacterError  text that a char tokenizer cannot spell
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping


class UlmError(Exception):
    """Base of all errors raised for a reason the user can act on."""


class ConfigError(UlmError):
    """A wrong value at a named place of a recipe, an option or a request."""

    def __init__(self, place: str, problem: str, remedy: str = "") -> None:
        self.place, self.problem, self.remedy = place, problem, remedy
        super().__init__(f"{place}: {problem}" + (f" ({remedy})" if remedy else ""))

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return type(self), (self.place, self.problem, self.remedy)  # crosses process borders intact


class UnknownKindError(ConfigError):
    """A slot has no implementation of that name."""


class ArtefactError(UlmError):
    """An artefact on disk is missing, of another format version, or does not match its digests."""


class CorpusError(UlmError):
    """Nothing usable is left of the sources."""


class TrainingError(UlmError):
    """Training stopped and cannot go on by itself."""


class UnsupportedError(UlmError):
    """The engine or kind cannot do this; the message names what can."""


class ClusterError(UlmError):
    """The cluster, a port or a server process is not to be had."""


class MemberDownError(UlmError):
    """The process of an engine is gone, or it does not answer."""


class RequestError(UlmError):
    """A request is refused. `status` is the HTTP status; `code` and `type` are OpenAI's."""

    status = 400
    type = "invalid_request_error"
    key_id: str | None = None  # of the valid key that sent it; not for the client

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.code = param, code

    @property
    def headers(self) -> dict[str, str]:
        """Of the response that says it."""
        return {}

    def __reduce__(self) -> tuple[object, ...]:
        return _bare, (type(self), self.args), self.__dict__  # crosses process borders intact


def _bare(cls: type[RequestError], args: tuple[object, ...]) -> RequestError:
    return cls.__new__(cls, *args)


class ContextLengthError(RequestError):
    """The prompt does not fit the model's context."""


class ModelNotFoundError(RequestError):
    """No model of that name is served here."""

    status = 404


class InvalidKeyError(RequestError):
    """No API key was given, or one that is unknown, revoked or expired; which of them is not told."""

    status = 401

    def __init__(self, message: str, *, param: str | None = None, code: str | None = "invalid_api_key") -> None:
        super().__init__(message, param=param, code=code)

    @property
    def headers(self) -> dict[str, str]:
        """The scheme that is wanted."""
        return {"WWW-Authenticate": "Bearer"}


class ScopeError(RequestError):
    """The key is valid, and not for this."""

    status = 403

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = "insufficient_permissions"
    ) -> None:
        super().__init__(message, param=param, code=code)


class RateLimitError(RequestError):
    """A limit per minute is reached; `kind` is requests or tokens, `retry_after_s` None where waiting does not help."""

    status = 429

    def __init__(
        self, message: str, *, kind: str, retry_after_s: float | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message, code="rate_limit_exceeded")
        self.type, self.retry_after_s, self._limits = kind, retry_after_s, dict(headers or {})

    @property
    def headers(self) -> dict[str, str]:
        """What is left, and when to come again."""
        if self.retry_after_s is None:
            return {**self._limits, "x-should-retry": "false"}  # OpenAI's clients heed it
        return {**self._limits, "Retry-After": str(max(1, math.ceil(self.retry_after_s)))}


class QuotaError(RequestError):
    """The key's quota has not enough left for this request."""

    status = 429
    type = "insufficient_quota"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = "insufficient_quota") -> None:
        super().__init__(message, param=param, code=code)

    @property
    def headers(self) -> dict[str, str]:
        """Waiting does not help, and OpenAI's clients heed it."""
        return {"x-should-retry": "false"}


class OverloadedError(RequestError):
    """Too much is waiting already; the same request may be accepted in `retry_after_s` seconds."""

    status = 503
    type = "server_error"

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after_s: float = 1.0
    ) -> None:
        super().__init__(message, param=param, code=code)
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> dict[str, str]:
        """When to come again."""
        return {"Retry-After": str(math.ceil(self.retry_after_s))}


class UnavailableError(OverloadedError):
    """Nobody is there to answer; the same request may be answered later."""


class UnknownCharacterError(RequestError):
    """A character that is not in the vocabulary of a char tokenizer; of a corpus's document, too."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A remedy: the nearest known name, or the list of all."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else "known: " + ", ".join(known)
