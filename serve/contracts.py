"""What serving is made of: requests, chunks, engines, members, strategies, ledgers. Plain values, no Ray, no HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
from torch import Tensor

from ulm.models.sampling import Sampling
from ulm.recipes.serve import Budget
from ulm.tokenizers.tokenizer import Tokenizer

if TYPE_CHECKING:
    from ulm.swarm.router import Router


@dataclass(frozen=True)
class RouterWeights:
    """Weights found by a router from the text so far, anew every `every_tokens` generated tokens."""

    path: str  # the clustering's folder
    members: tuple[str, ...]  # by cluster number
    top_k: int
    every_tokens: int = 64
    max_calls: int | None = None  # members that may be drawn in over the whole answer


@dataclass(frozen=True)
class GenerateRequest:
    """Continue `tokens` with one member, or with several mixed in probability space."""

    tokens: tuple[int, ...]
    weights: Mapping[str, float] | RouterWeights  # {member: 1.0} for one
    max_tokens: int
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    num_top_logprobs: int | None = None  # None: no logprobs at all
    deadline_s: float | None = None  # seconds the engine may take, from its receipt
    stream: bool = True  # False: one chunk at the end will do


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
class Call:
    """One member's part in one answer."""

    member: str
    tokens_in: int
    tokens_out: int
    ms: float
    weight: float  # mean over the tokens it had a part in
    why: str


@dataclass(frozen=True)
class TokenChunk:
    """A piece of an answer. `text` lags behind `tokens` while a stop string or a character is undecided."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None  # stop, length or deadline, on the last chunk
    calls: tuple[Call, ...] = ()  # on the last chunk
    degraded: str | None = None  # on the last chunk: what was not done as asked

    @classmethod
    def joined(cls, chunks: Sequence[TokenChunk]) -> TokenChunk:
        """Chunks of one answer, in order, as one."""
        return replace(
            chunks[-1],
            text="".join(chunk.text for chunk in chunks),
            tokens=tuple(token for chunk in chunks for token in chunk.tokens),
            logprobs=tuple(entry for chunk in chunks for entry in chunk.logprobs),
        )


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
    router_path: str | None = None


@dataclass
class Ledger:
    """What an answer did spend, and what it was allowed."""

    strategy: str
    calls: list[Call] = field(default_factory=list)
    budget: Budget = Budget()
    degraded: list[str] = field(default_factory=list)


class Strategy(Protocol):
    """How members answer together. One registered class a file in serve/strategies."""

    def missing(self, members: Mapping[str, Member], context: SwarmContext) -> str | None:
        """What this strategy lacks here, or None: then it is offered as a model."""
        ...

    def answer(
        self, request: GenerateRequest, members: Mapping[str, Member], context: SwarmContext, budget: Budget
    ) -> AsyncIterator[TokenChunk | Ledger]:
        """Chunks of the answer, the Ledger last. The request's own weights are replaced by the strategy's."""
        ...
