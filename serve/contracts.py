"""What serving is made of: requests, chunks, engines, members, strategies, ledgers. Plain values, no Ray, no HTTP."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
from torch import Tensor

from serve.constrained import Grammars, check_schema
from serve.health import Health
from ulm.errors import RequestError
from ulm.models.sampling import Sampling
from ulm.recipes.serve import PATIENCE_S, Budget
from ulm.tokenizers.tokenizer import Tokenizer

if TYPE_CHECKING:
    from ulm.swarm.router import Router

MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 100
MAX_PRIORITY = 100
SECONDS_A_TOKEN = 0.5  # more patience with an answer that comes in one piece, for each of its tokens


@dataclass(frozen=True)
class GenerateRequest:
    """Continue `tokens` with one member, or with several mixed in probability space."""

    tokens: tuple[int, ...]
    weights: Mapping[str, float]  # {member: 1.0} for one
    max_tokens: int
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    num_top_logprobs: int | None = None  # None: no logprobs at all
    deadline_s: float | None = None  # seconds the engine may take, from its receipt
    stream: bool = True  # False: one chunk a choice, at its end, will do
    n: int = 1  # choices; number i is drawn with seed + i
    best_of: int | None = None  # draw so many, and give the n whose tokens are likeliest on average
    prompt_logprobs: int | None = None  # of every prompt token, with so many likeliest ones; None: none
    echo: bool = False  # the prompt's text before each choice's own
    priority: int = 0  # higher first; each unit is worth as much as some seconds of waiting
    # Tokens of this answer that were generated before, by whomever. They count for penalties, draws and stop strings;
    # they are not sent again, and max_tokens are those that follow.
    generated: tuple[int, ...] = ()
    json_schema: str | None = None  # what the answer is JSON of, unless it is cut short; see constrained.py

    def check(self) -> None:
        """RequestError by name for settings that contradict each other or mean nothing."""
        if not self.tokens:
            raise RequestError("The prompt has no tokens: at least one is needed", param="prompt")
        if self.max_tokens < 0:
            raise RequestError(f"max_tokens: {self.max_tokens} is below 0", param="max_tokens")
        if self.max_tokens == 0 and not (self.echo or self.prompt_logprobs is not None):
            message = "max_tokens: 0 asks for nothing; echo or prompt_logprobs beside it ask for the prompt"
            raise RequestError(message, param="max_tokens")
        if "" in self.stop:
            raise RequestError("stop: a stop string of nothing would end every answer at once", param="stop")
        if not 1 <= self.n <= MAX_CHOICES:
            raise RequestError(f"n: {self.n} is not within 1 to {MAX_CHOICES}", param="n")
        if self.best_of is not None and not self.n <= self.best_of <= MAX_CHOICES:
            problem = f"best_of: {self.best_of} is not within n, which is {self.n}, and {MAX_CHOICES}"
            raise RequestError(problem, param="best_of")
        if self.best_of is not None and self.best_of > self.n and self.stream:
            raise RequestError("best_of: the best are known at the end only; ask without stream", param="best_of")
        if self.num_choices > 1 and self.sampling.temperature == 0 and self.max_tokens > 0:
            problem = f"{self.num_choices} choices at temperature 0 would all be the same"
            raise RequestError(f"n: {problem}; give a temperature above 0", param="n")
        for name, value in (("num_top_logprobs", self.num_top_logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if value is not None and not 0 <= value <= MAX_TOP_LOGPROBS:
                raise RequestError(f"{name}: {value} is not within 0 to {MAX_TOP_LOGPROBS}", param="logprobs")
        if self.deadline_s is not None and not self.deadline_s >= 0:
            raise RequestError(f"deadline_s: {self.deadline_s} is no time from now on", param="deadline_s")
        if not abs(self.priority) <= MAX_PRIORITY:
            raise RequestError(f"priority: {self.priority} is beyond +-{MAX_PRIORITY}", param="priority")
        if self.generated and (self.num_choices > 1 or self.echo or self.prompt_logprobs is not None):
            problem = "an answer that goes on has one choice, and its prompt was given before"
            raise RequestError(f"generated: {problem}", param="generated")
        if self.json_schema is not None:
            if self.echo:
                raise RequestError("echo: the prompt before it would make an answer no JSON", param="echo")
            check_schema(self.json_schema)
        for member, weight in self.weights.items():
            if not (weight >= 0 and math.isfinite(weight)):
                raise RequestError(f"weights: {weight} of {member!r} is no weight", param="weights")
        if not 0 < sum(self.weights.values()) < math.inf:
            problem = "at least one member needs a weight above zero, and their sum must be finite"
            raise RequestError(f"weights: {problem}", param="weights")

    @property
    def num_choices(self) -> int:
        """Answers to draw."""
        return max(self.n, self.best_of or 1)


@dataclass(frozen=True)
class TokenLogprob:
    """A chosen token, its log-probability in nats, and the most likely tokens at its place, likeliest first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()

    @classmethod
    def of(cls, logprobs_V: Tensor, token: int, num_top: int | None) -> tuple[TokenLogprob, ...]:
        """The entry of a chosen token, for a chunk; nothing where no logprobs were asked for."""
        if num_top is None:
            return ()
        values, tokens = logprobs_V.topk(num_top)
        return (cls(token, float(logprobs_V[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True))),)


@dataclass(frozen=True)
class TokenChunk:
    """A piece of an answer. `text` lags behind `tokens` while a stop string or a character is undecided."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None  # stop or length, on a choice's last chunk; a deadline is length, and degraded
    degraded: str | None = None  # on the last chunk of all: what was not done as asked
    index: int = 0  # of the choice
    prompt_logprobs: tuple[TokenLogprob, ...] = ()  # of prompt tokens 1, 2, …; on the first chunk of all

    @classmethod
    def joined(cls, chunks: Sequence[TokenChunk]) -> TokenChunk:
        """Chunks of one choice, in order, as one."""
        return replace(
            chunks[-1],
            text="".join(chunk.text for chunk in chunks),
            tokens=tuple(token for chunk in chunks for token in chunk.tokens),
            logprobs=tuple(entry for chunk in chunks for entry in chunk.logprobs),
            prompt_logprobs=tuple(entry for chunk in chunks for entry in chunk.prompt_logprobs),
        )

    @classmethod
    def by_choice(cls, chunks: Sequence[TokenChunk]) -> list[TokenChunk]:
        """Chunks of an answer, in order, as one a choice; last the one that ended last, with the remarks."""
        of: dict[int, list[TokenChunk]] = {}
        for chunk in chunks:
            of.setdefault(chunk.index, []).append(chunk)
        last = chunks[-1].index
        return [cls.joined(of[index]) for index in sorted(of, key=lambda index: (index == last, index))]


@dataclass(frozen=True)
class MemberInfo:
    """A loaded member."""

    checkpoint: str
    digest: str
    context_tokens: int
    vocab_size: int
    num_parameters: int


class Engine(Protocol):
    """Runs members. Token ids in and out. What it cannot do raises UnsupportedError."""

    async def members(self) -> dict[str, MemberInfo]:
        """What is loaded now."""
        ...

    async def load(self, member: str, checkpoint: str) -> MemberInfo:
        """Make a member from a checkpoint folder."""
        ...

    async def unload(self, member: str) -> None:
        """Forget a member; answers under way are finished."""
        ...

    async def reload(self, member: str, checkpoint: str) -> MemberInfo:
        """New weights for a member; answers under way go on with the old ones."""
        ...

    def generate(self, request: GenerateRequest) -> AsyncIterator[TokenChunk]:
        """Chunks of an answer; closing the iterator cancels it."""
        ...

    async def score(self, member: str, tokens: Sequence[int]) -> list[float]:
        """log p(tokens[i] | tokens[:i]) for i >= 1, in nats: one less than tokens."""
        ...

    async def next_logprobs(self, member: str, tokens: Sequence[int]) -> np.ndarray:
        """float32 log-probabilities of the whole vocabulary after `tokens`; prefixes seen lately are not recomputed."""
        ...

    async def embed(self, member: str, tokens: Sequence[int]) -> np.ndarray:
        """Mean of the last hidden states, float32 of width d_model."""
        ...

    async def stats(self) -> dict[str, float]:
        """Running and waiting answers, generated tokens, memory."""
        ...

    async def close(self) -> None:
        """End; answers under way fail."""
        ...


@dataclass(frozen=True)
class Member:
    """One served model as strategies see it: what it knows of itself, and the engine that runs it."""

    id: str
    engine: Engine
    tokenizer: Tokenizer
    context_tokens: int
    cluster: int | None = None
    domain: str | None = None


@dataclass(frozen=True)
class SwarmContext:
    """What a strategy may use beside the members."""

    router: Router | None = None
    fallback: tuple[str, ...] = ()  # members that answer, in this order, when those that should do not
    health: Health = field(default_factory=Health)
    patience_s: float = PATIENCE_S  # a member that says nothing for so long has failed
    grammars: Grammars = field(default_factory=Grammars)  # of answers that are mixed here


@dataclass
class Call:
    """One member's part in one answer."""

    member: str
    tokens_in: int
    why: str
    tokens_out: int = 0
    ms: float = 0.0
    weight: float = 0.0  # mean over the tokens it had a part in

    def add(self, num_tokens: int, weight: float) -> None:
        """Enter tokens that it had a part in."""
        if num_tokens:
            self.weight = (self.weight * self.tokens_out + weight * num_tokens) / (self.tokens_out + num_tokens)
            self.tokens_out += num_tokens


@dataclass
class Ledger:
    """What an answer did spend, and what it was allowed."""

    strategy: str
    calls: list[Call] = field(default_factory=list)
    budget: Budget = Budget()
    degraded: list[str] = field(default_factory=list)  # what was not done as asked, and why
    num_discarded: int = 0  # tokens of answers that best_of had drawn, and that are not given


class Strategy(Protocol):
    """How members answer together. One registered class a file in serve/strategies."""

    def missing(self, members: Mapping[str, Member], context: SwarmContext) -> str | None:
        """What this strategy lacks here, or None: then it is offered as a model."""
        ...

    def answer(
        self, request: GenerateRequest, members: Mapping[str, Member], context: SwarmContext, budget: Budget
    ) -> AsyncIterator[TokenChunk | Ledger]:
        """Chunks of the answer, the Ledger last. The request's own weights are replaced by the strategy's.

        Budgets of calls and tokens are never exceeded, that of time by at most one step of an engine.
        """
        ...
