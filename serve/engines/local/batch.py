"""Continuous batching: what every step does for every answer under way.

A step gives every row its next tokens (a chunk of its prompt, or the one token chosen last), mixes the members'
probabilities where an answer has several, and chooses. Rows are kept dense (a leaving row is filled by the last), so
that the rows of a batch are a view of the cache, never a copy.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from serve.contracts import GenerateRequest, RouterWeights, TokenChunk, TokenLogprob
from serve.engines.local.answer import Answer
from serve.engines.local.member import LoadedMember
from ulm.errors import ModelNotFoundError, UnsupportedError
from ulm.models.sampling import choose
from ulm.swarm.mixture import mix_logprobs
from ulm.swarm.router import Router


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
        for answer in list(self.running):
            self._alone(answer, self._weigh)
        with torch.no_grad():
            for member in self._live():
                member.decode()
            self._prefill()
        for answer in [a for a in self.running if a.logprobs.keys() >= a.weights.keys()]:
            self._alone(answer, self._choose)
        return bool(self.running or self.waiting)

    def _alone(self, answer: Answer, work: Callable[[Answer], None]) -> None:
        """Do one answer's part of a step; its failure is its own and ends nobody else's."""
        try:
            work(answer)
        except Exception as error:  # noqa: BLE001  handed to whoever waits for the answer
            if answer in self.running:
                self._end(answer, None)
            answer.emit(error)

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
        """Seat waiting answers in order, where every member they begin with has a row free.

        One that must wait keeps later ones from its members, so that it is not overtaken there for ever.
        """
        taken: set[int] = set()
        for answer in list(self.waiting):
            members = [answer.members[m] for m in answer.first_weights]
            if any(self._is_full(member) or id(member) in taken for member in members):
                taken.update(id(member) for member in members)
                continue
            self.waiting.remove(answer)
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
