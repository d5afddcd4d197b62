"""An answer under way: its tokens so far, its weights over members, and what the ledger will say of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from serve.contracts import Call, GenerateRequest, RouterWeights, TokenChunk
from serve.engines.local.member import LoadedMember
from ulm.models.generate import room
from ulm.models.text_stream import TextStream
from ulm.swarm.router import Router, top_k


@dataclass(eq=False)
class Part:
    """A member's part in an answer, as the ledger will have it."""

    why: str
    tokens_in: int
    tokens_out: int = 0
    weight: float = 0.0
    started_s: float = field(default_factory=time.monotonic)
    ended_s: float = 0.0


@dataclass(eq=False)
class Answer:
    """One request under way."""

    request: GenerateRequest
    members: dict[str, LoadedMember]  # all it may use, as they were when it came
    emit: Callable[[TokenChunk | Exception], None]
    router: Router | None
    received_s: float = field(default_factory=time.monotonic)
    tokens: list[int] = field(default_factory=list)  # prompt and generated
    weights: dict[str, float] = field(default_factory=dict)
    seated: set[str] = field(default_factory=set)
    logprobs: dict[str, Tensor] = field(default_factory=dict)  # of the next token, by member
    parts: list[tuple[str, Part]] = field(default_factory=list)
    degraded: str | None = None
    cancelled: bool = False

    def __post_init__(self) -> None:
        first = next(iter(self.members.values()))
        self.tokens = list(self.request.tokens)
        self.stream = TextStream(first.tokenizer, self.request.stop)
        context_tokens = min(m.model.spec.context_tokens for m in self.members.values())
        self.max_tokens = min(self.request.max_tokens, room(len(self.tokens), context_tokens))
        self.eot_id = first.tokenizer.eot_id
        self.first_weights = self.wanted_weights() or {}

    @property
    def num_generated(self) -> int:
        """Tokens chosen so far."""
        return len(self.tokens) - len(self.request.tokens)

    def wanted_weights(self) -> dict[str, float] | None:
        """New weights where it is time for them, else None."""
        asked = self.request.weights
        if not isinstance(asked, RouterWeights):
            return None if self.weights else {m: w for m, w in asked.items() if w > 0}
        if self.weights and self.num_generated % asked.every_tokens:
            return None
        assert self.router is not None
        tokenizer = next(iter(self.members.values())).tokenizer
        weights_N = top_k(self.router.weights(tokenizer.decode(self.tokens)), asked.top_k)
        return {m: float(w) for m, w in zip(asked.members, weights_N, strict=True) if w > 0}

    def begin_parts(self, weights: dict[str, float], why: str) -> None:
        """Go on with these weights; a member that was not in the last ones begins a new part."""
        for member in weights:
            if member not in self.weights:
                self.parts.append((member, Part(why, tokens_in=len(self.tokens))))
        self.weights, self.logprobs = weights, {}

    def calls(self) -> tuple[Call, ...]:
        """The ledger's lines."""
        return tuple(
            Call(
                member,
                part.tokens_in,
                part.tokens_out,
                ms=round(1e3 * (max(part.ended_s, part.started_s) - part.started_s), 3),
                weight=round(part.weight / part.tokens_out, 6) if part.tokens_out else 0.0,
                why=part.why,
            )
            for member, part in self.parts
        )
