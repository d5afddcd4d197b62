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
    ├── OverloadedError        too many requests are waiting already: ask again later
    │   └── UnavailableError   no member that could answer is up: ask again later
    └── UnknownCharacterError  text that a char tokenizer cannot spell
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.code = param, code

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_request_error, (type(self), str(self), self.param, self.code)


def _rebuild_request_error(cls: type[RequestError], message: str, param: str | None, code: str | None) -> RequestError:
    return cls(message, param=param, code=code)


class ContextLengthError(RequestError):
    """The prompt does not fit the model's context."""


class ModelNotFoundError(RequestError):
    """No model of that name is served here."""

    status = 404


class OverloadedError(RequestError):
    """Too much is waiting already; the same request may be accepted in `retry_after_s` seconds."""

    status = 503
    type = "server_error"

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after_s: float = 1.0
    ) -> None:
        super().__init__(message, param=param, code=code)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_overloaded_error, (type(self), str(self), self.param, self.code, self.retry_after_s)


def _rebuild_overloaded_error(
    cls: type[OverloadedError], message: str, param: str | None, code: str | None, retry_after_s: float
) -> OverloadedError:
    return cls(message, param=param, code=code, retry_after_s=retry_after_s)


class UnavailableError(OverloadedError):
    """Nobody is there to answer; the same request may be answered later."""


class UnknownCharacterError(RequestError):
    """A character that is not in the vocabulary of a char tokenizer; of a corpus's document, too."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A remedy: the nearest known name, or the list of all."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else "known: " + ", ".join(known)
