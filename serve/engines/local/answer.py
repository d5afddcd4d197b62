"""A request under way: its choices, their tokens, and what the ledger will say of the members' parts."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from serve.contracts import Call, GenerateRequest, RouterWeights, TokenChunk, TokenLogprob
from serve.engines.local.members import Loaded
from serve.engines.local.paged import PAGE_TOKENS
from serve.engines.local.sampler import Row
from ulm.errors import ArtefactError
from ulm.models.generate import room
from ulm.models.text_stream import TextStream
from ulm.swarm.router import Router, top_k

PRIORITY_S = 10.0  # a unit of priority is worth so many seconds of waiting, so that nobody waits for ever
Want = Literal["text", "next", "hidden"]


@dataclass(eq=False)
class Part:
    """A member's part in a choice, as the ledger will have it."""

    why: str
    tokens_in: int
    tokens_out: int = 0
    weight: float = 0.0
    started_s: float = field(default_factory=time.monotonic)
    ended_s: float = 0.0


class Choice:
    """One continuation of a request's prompt, and the seats it has with the members that it uses."""

    def __init__(self, answer: Answer, index: int) -> None:
        request = answer.request
        self.answer, self.index = answer, index
        self.tokens = list(request.tokens)
        self.text = TextStream(answer.tokenizer, request.stop)
        self.row = Row.of(request.sampling.choice(index), request.tokens)
        self.weights: dict[str, float] = {}
        self.seats: dict[str, Any] = {}  # by member, of its runner
        self.parts: list[tuple[str, Part]] = []
        self.finish_reason: str | None = None
        self.logprob_sum = 0.0
        # What was not sent yet.
        self.held_text = answer.echo_text
        self.held_tokens: list[int] = []
        self.held_logprobs: list[TokenLogprob] = []
        self.is_sent = False  # its end, too

    @property
    def num_generated(self) -> int:
        """Tokens chosen so far."""
        return len(self.tokens) - len(self.answer.request.tokens)

    def wanted_weights(self) -> dict[str, float] | None:
        """New weights over members, of sum 1, where it is time for them, else None."""
        asked = self.answer.request.weights
        if not isinstance(asked, RouterWeights):
            total = math.fsum(asked.values())
            return None if self.weights else {m: w / total for m, w in asked.items() if w > 0}
        if self.weights and self.num_generated % asked.every_tokens:
            return None
        assert self.answer.router is not None
        weights_N = top_k(self.answer.router.weights(self.answer.tokenizer.decode(self.tokens)), asked.top_k)
        weights = {m: float(w) for m, w in zip(asked.members, weights_N, strict=True) if w > 0}
        if not weights:
            raise ArtefactError(f"{asked.path}: its router gives no member a weight above zero")
        return weights

    def begin_parts(self, weights: dict[str, float], why: str) -> None:
        """Go on with these weights; a member that was not in the last ones begins a new part."""
        for member in weights:
            if member not in self.weights:
                self.parts.append((member, Part(why, tokens_in=len(self.tokens))))
        self.weights = weights

    def count(self, *, ended: bool) -> None:
        """Enter one more token in the parts of the members that had a say in it; of an answer's end only the time."""
        now_s = time.monotonic()
        latest = dict(self.parts)  # the last part of each member
        for member, weight in self.weights.items():
            part = latest[member]
            part.ended_s = now_s
            if not ended:
                part.tokens_out += 1
                part.weight += weight

    def take_chunk(self, index: int) -> TokenChunk:
        """All that was not sent yet."""
        chunk = TokenChunk(
            self.held_text, tuple(self.held_tokens), tuple(self.held_logprobs), self.finish_reason, index=index
        )
        self.held_text, self.held_tokens, self.held_logprobs = "", [], []
        return chunk


class Answer:
    """One request under way."""

    def __init__(
        self,
        request: GenerateRequest,
        members: dict[str, Loaded],
        router: Router | None = None,
        want: Want = "text",
        mailbox: Any = None,
    ) -> None:
        """`members` are all it may use, as they were when it came; `mailbox` is its owner's, to find it again by."""
        self.request, self.members, self.router, self.want, self.mailbox = request, members, router, want, mailbox
        self.received_s = time.monotonic()
        self.due_s = self.received_s - PRIORITY_S * request.priority  # whose comes first, goes first
        self.tokenizer = next(iter(members.values())).tokenizer
        context_tokens = min(m.spec.context_tokens for m in members.values())
        num_prompt = len(request.tokens)
        if want != "text" or request.max_tokens == 0:
            room(num_prompt - 1, context_tokens)
            self.max_tokens = 0
        else:
            self.max_tokens = min(request.max_tokens, room(num_prompt, context_tokens))
        # What follows the last token of a prompt that is only looked at is nobody's question.
        self.num_to_run = num_prompt if want != "text" or self.max_tokens else num_prompt - 1
        self.wants_prompt = request.prompt_logprobs is not None
        self.echo_text = self._echo() if request.echo else ""
        self.prompt_logprobs: list[TokenLogprob] = []  # of prompt tokens 1, 2, …, as far as they are known
        self.prompt_sent = False
        self.hidden_sum: Tensor | None = None
        self.degraded: str | None = None
        self.cancelled = False
        self.choices = [Choice(self, 0)]  # the others part from it when the prompt has been read

    def _echo(self) -> str:
        tokens = self.request.tokens
        return self.tokenizer.decode(tokens[1:] if tokens[0] == self.tokenizer.eot_id else tokens)

    @property
    def is_prompt_scored(self) -> bool:
        """Whether nothing more has to be found out about the prompt's tokens."""
        return not self.wants_prompt or len(self.prompt_logprobs) >= len(self.request.tokens) - 1

    def prompt_pages(self, num_run: int) -> dict[int, tuple[TokenLogprob, ...]] | None:
        """The log-probabilities of whole pages of the `num_run` tokens run, by page; the very first token has none.

        None where they are not the member's own, or have more with them than pages keep.
        """
        if len(self.members) > 1 or self.request.prompt_logprobs:
            return None
        known = self.prompt_logprobs
        whole = range(min(num_run, len(known) + 1) // PAGE_TOKENS)
        return {p: tuple(known[max(0, p * PAGE_TOKENS - 1) : (p + 1) * PAGE_TOKENS - 1]) for p in whole}

    @property
    def unfinished(self) -> list[Choice]:
        """Choices that go on."""
        return [choice for choice in self.choices if choice.finish_reason is None]

    def fork(self) -> list[Choice]:
        """The other choices, made when the prompt has been read: same weights, no seats yet."""
        first = self.choices[0]
        made = [Choice(self, index) for index in range(1, self.request.num_choices)]
        for choice in made:
            if first.parts:
                choice.begin_parts(dict(first.weights), first.parts[0][1].why)
        self.choices += made
        return made

    def best(self) -> list[Choice]:
        """The choices to give: all, or of more than n those whose tokens are likeliest on average, likeliest first."""
        if len(self.choices) <= self.request.n:
            return self.choices
        ranked = sorted(self.choices, key=lambda c: (-c.logprob_sum / max(1, c.num_generated), c.index))
        return ranked[: self.request.n]

    def calls(self) -> tuple[Call, ...]:
        """The ledger's lines: parts of the same member for the same reason, of several choices, are one."""
        lines: dict[tuple[str, str, int], list[Part]] = {}
        for choice in self.choices:
            seen: dict[tuple[str, str], int] = {}
            for member, part in choice.parts:
                number = seen[member, part.why] = seen.get((member, part.why), -1) + 1
                lines.setdefault((member, part.why, number), []).append(part)
        return tuple(_call(member, why, parts) for (member, why, _), parts in lines.items())


def _call(member: str, why: str, parts: Sequence[Part]) -> Call:
    tokens_out = sum(part.tokens_out for part in parts)
    started_s = min(part.started_s for part in parts)
    ended_s = max(started_s, *(part.ended_s for part in parts))
    weight = sum(part.weight for part in parts) / tokens_out if tokens_out else 0.0
    return Call(member, parts[0].tokens_in, tokens_out, round(1e3 * (ended_s - started_s), 3), round(weight, 6), why)
