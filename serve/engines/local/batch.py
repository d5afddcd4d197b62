"""Continuous batching: each member keeps a KV cache whose rows are the answers under way.

A step gives every row its next tokens (a chunk of its prompt, or the one token chosen last), mixes the members'
probabilities where an answer has several, and chooses. Rows are kept dense (a leaving row is filled by the last), so
that the rows of a batch are a view of the cache, never a copy.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from serve.contracts import Call, GenerateRequest, RouterWeights, TokenChunk, TokenLogprob
from ulm.components.cache import Cache
from ulm.errors import ModelNotFoundError, UnsupportedError
from ulm.models.decoder import Decoder
from ulm.models.generate import room
from ulm.models.sampling import choose
from ulm.models.text_stream import TextStream
from ulm.swarm.mixture import mix_logprobs
from ulm.swarm.router import Router, top_k
from ulm.tokenizers.tokenizer import Tokenizer


class LoadedMember:
    """A model, its tokenizer, and the rows it works on: row i of the cache belongs to `answers[i]`."""

    def __init__(self, member: str, model: Decoder, tokenizer: Tokenizer, max_rows: int) -> None:
        self.id, self.model, self.tokenizer = member, model, tokenizer
        self.cache: Cache = model.new_cache(max_rows)
        self.answers: list[Answer] = []
        self.max_rows = max_rows

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def seat(self, answer: Answer) -> None:
        """Give an answer an empty row."""
        self.cache.lengths_B[len(self.answers)] = 0
        self.answers.append(answer)

    def leave(self, answer: Answer) -> None:
        """Take an answer's row; the last row moves into the gap."""
        row, last = self.answers.index(answer), len(self.answers) - 1
        if row != last:
            self.cache.copy_row(last, row)
            self.answers[row] = self.answers[last]
        self.answers.pop()

    def prefill(self, answer: Answer, num_tokens: int) -> None:
        """Give one answer's row up to `num_tokens` of the tokens it has not seen."""
        row = self.answers.index(answer)
        known = int(self.cache.lengths_B[row])
        new = answer.tokens[known : known + num_tokens]
        logits_BTV = self.model.step(torch.tensor([new], device=self.device), self.cache.rows(row, row + 1))
        if known + len(new) == len(answer.tokens):
            answer.logprobs[self.id] = logits_BTV[0, -1].float().log_softmax(-1)

    def decode(self) -> None:
        """Give every row that is behind by exactly one token that token, all in one pass."""
        num_rows = len(self.answers)
        behind = [
            self.id in answer.weights and len(answer.tokens) - int(known) == 1
            for answer, known in zip(self.answers, self.cache.lengths_B[:num_rows], strict=True)
        ]
        if not any(behind):
            return
        tokens_BT = torch.tensor([[answer.tokens[-1]] for answer in self.answers], device=self.device)
        num_new_B = torch.tensor(behind, dtype=torch.long)
        logprobs_BV = self.model.step(tokens_BT, self.cache.rows(0, num_rows), num_new_B)[:, -1].float().log_softmax(-1)
        for row, answer in enumerate(self.answers):
            if behind[row]:
                answer.logprobs[self.id] = logprobs_BV[row]


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


class Batch:
    """All members and all answers under way in one process. Not thread-safe: one thread calls it."""

    def __init__(self, prefill_tokens: int) -> None:
        self.members: dict[str, LoadedMember] = {}
        self.waiting: deque[Answer] = deque()
        self.running: list[Answer] = []
        self.num_generated_tokens = 0
        self._prefill_tokens = prefill_tokens  # per step, so that a long prompt does not stall the others

    def add(self, answer: Answer) -> None:
        """Queue an answer."""
        self.waiting.append(answer)

    def answer(
        self, request: GenerateRequest, router: Router | None, emit: Callable[[TokenChunk | Exception], None]
    ) -> Answer:
        """A new answer over members that are loaded now."""
        asked = request.weights
        named = asked.members if isinstance(asked, RouterWeights) else [m for m, w in asked.items() if w > 0]
        if not named:
            raise UnsupportedError("a request needs at least one member with a weight above zero")
        for member in named:
            if member not in self.members:
                raise ModelNotFoundError(f"The engine has no member {member!r}", code="model_not_found")
        members = {m: self.members[m] for m in named}
        if len({m.tokenizer.digest for m in members.values()}) > 1:
            raise UnsupportedError("members of one mixture must share a tokenizer")
        return Answer(request, members, emit, router)

    def step(self) -> bool:
        """One step for everybody; False when there is nothing to do."""
        self._end_overdue()
        self._admit()
        for answer in self.running:
            self._weigh(answer)
        with torch.no_grad():
            for member in self._live():
                member.decode()
            self._prefill()
        for answer in [a for a in self.running if a.logprobs.keys() >= a.weights.keys()]:
            self._choose(answer)
        return bool(self.running or self.waiting)

    def _live(self) -> Iterator[LoadedMember]:
        seen: dict[int, LoadedMember] = {}
        for answer in self.running:
            for member in answer.seated:
                seen.setdefault(id(answer.members[member]), answer.members[member])
        return iter(seen.values())

    def _end_overdue(self) -> None:
        now = time.monotonic()
        for answer in [*self.running, *self.waiting]:
            deadline_s = answer.request.deadline_s
            if answer.cancelled:
                self._end(answer, None)
            elif deadline_s is not None and now - answer.received_s > deadline_s:
                answer.degraded = "budget.max_ms reached"
                self._end(answer, "length")

    def _admit(self) -> None:
        """Seat waiting answers in order, as long as every member they begin with has a row free."""
        while self.waiting:
            answer = self.waiting[0]
            if any(self._is_full(answer.members[m]) for m in answer.first_weights):
                return
            self.waiting.popleft()
            self.running.append(answer)
            answer.begin_parts(answer.first_weights, "routed" if answer.router else "asked")
            self._seat(answer)

    def _seat(self, answer: Answer) -> None:
        for member in answer.weights:
            if member not in answer.seated:
                answer.members[member].seat(answer)
                answer.seated.add(member)

    def _weigh(self, answer: Answer) -> None:
        """Re-weigh a routed answer where it is time. Without rows or calls left it keeps the weights it has."""
        if answer.logprobs or not answer.num_generated:
            return
        weights = answer.wanted_weights()
        if weights is None:
            return
        asked = answer.request.weights
        joining = [m for m in weights if m not in answer.weights]
        if isinstance(asked, RouterWeights) and asked.max_calls is not None:
            if len(answer.parts) + len(joining) > asked.max_calls:
                answer.degraded = "budget.max_calls reached: members kept"
                return
        full = [m for m in joining if m not in answer.seated and self._is_full(answer.members[m])]
        if full:
            answer.degraded = f"member {full[0]} was full: members kept"
            return
        answer.begin_parts(weights, "re-routed")
        self._seat(answer)

    @staticmethod
    def _is_full(member: LoadedMember) -> bool:
        return len(member.answers) >= member.max_rows

    def _prefill(self) -> None:
        left = self._prefill_tokens
        for answer in self.running:
            for member_id in answer.weights:
                member = answer.members[member_id]
                known = int(member.cache.lengths_B[member.answers.index(answer)])
                behind = len(answer.tokens) - known
                if left > 0 and member_id not in answer.logprobs and behind >= 1:
                    member.prefill(answer, min(left, behind))
                    left -= min(left, behind)

    def _choose(self, answer: Answer) -> None:
        members = list(answer.weights)
        if len(members) == 1:
            logprobs_V = answer.logprobs[members[0]]
        else:
            logprobs_NV = torch.stack([answer.logprobs[m] for m in members])
            logprobs_V = mix_logprobs(logprobs_NV, torch.tensor([answer.weights[m] for m in members]))
        logprobs_V = logprobs_V.cpu()
        token = choose(logprobs_V, answer.request.sampling, answer.num_generated)
        answer.logprobs = {}
        now = time.monotonic()
        ended = token == answer.eot_id
        latest = dict(answer.parts)  # the last part of each member
        for member, weight in answer.weights.items():
            part = latest[member]
            part.ended_s = now
            part.tokens_out += not ended
            part.weight += 0.0 if ended else weight
        if ended:
            self._end(answer, "stop")
            return
        answer.tokens.append(token)
        self.num_generated_tokens += 1
        text = answer.stream.push(token)
        chunk = TokenChunk(text, (token,), TokenLogprob.of(logprobs_V, token, answer.request.num_top_logprobs))
        if answer.stream.stopped:
            self._end(answer, "stop", chunk)
        elif answer.num_generated >= answer.max_tokens:
            self._end(answer, "length", chunk)
        else:
            answer.emit(chunk)

    def _end(self, answer: Answer, finish_reason: str | None, chunk: TokenChunk | None = None) -> None:
        """Free its rows and send the last chunk (none when cancelled)."""
        for member in answer.seated:
            answer.members[member].leave(answer)
        (self.running if answer in self.running else self.waiting).remove(answer)
        if finish_reason is not None:
            chunk = chunk or TokenChunk("", ())
            chunk = replace(chunk, text=chunk.text + answer.stream.finish(), finish_reason=finish_reason)
            answer.emit(replace(chunk, calls=answer.calls(), degraded=answer.degraded))

    def fail_all(self, error: Exception) -> None:
        """End every answer with an error."""
        for answer in [*self.running, *self.waiting]:
            self._end(answer, None)
            answer.emit(error)
