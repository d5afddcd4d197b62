"""Continuous batching: which tokens are run in a step, for whom, and what is chosen after them.

Every step, each sequence under way is given its next tokens: the one chosen last, or a chunk of its prompt, as far as
the step's tokens go. Whoever has waited longest comes first (a priority counts as waiting). Where memory is lacking the
one who came last gives its own back, waits, and later goes on from the tokens it has. Nobody can wait for ever: what
could not be held by an empty cache is refused at once, and the first in line always gets what it needs.
"""

from __future__ import annotations

import logging
import time
from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from serve.contracts import TokenLogprob
from serve.engines.local.answer import Answer, Choice
from serve.engines.local.runner import Runner, Work
from serve.engines.local.sampler import choose_all, logprobs_of
from ulm.errors import ContextLengthError, OverloadedError, RequestError, UlmError
from ulm.swarm.mixture import mix_logprobs

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Piece:
    """Work of one choice in this step: the same tokens for each member that takes part."""

    choice: Choice
    start: int
    stop: int
    members: tuple[str, ...]
    work: tuple[Work, ...]
    rows: tuple[tuple[Tensor, int, int], ...] = ()  # what each member found: a tensor, and rows of it


class Scheduler:
    """All answers under way in one process. Not thread-safe: one thread calls it."""

    def __init__(self, max_answers: int, max_batch_tokens: int, max_waiting: int) -> None:
        self.max_answers, self.max_batch_tokens, self.max_waiting = max_answers, max_batch_tokens, max_waiting
        self.waiting: list[Answer] = []  # both in order of due_s
        self.running: list[Answer] = []
        self.outbox: list[tuple[Answer, Any]] = []  # chunks, tensors and errors to be delivered
        self.num_generated_tokens = self.num_steps = self.num_preemptions = 0

    # ---- coming and going

    def add(self, answer: Answer) -> None:
        """Queue an answer; RequestError where it could never be held, or where too many wait already."""
        if len(self.waiting) >= self.max_waiting:
            message = (
                f"{len(self.waiting)} requests are waiting already, the most this engine lets wait: ask again later"
            )
            raise OverloadedError(message, code="overloaded")
        if answer.request.num_choices > self.max_answers:
            problem = f"{answer.request.num_choices} choices at once, and this engine works on {self.max_answers}"
            raise ContextLengthError(f"n: {problem}", param="n", code="too_many_choices")
        num_tokens = min(
            len(answer.request.tokens) + answer.num_to_reach, *(m.spec.context_tokens for m in answer.members.values())
        )
        for runner, num_seats in _seats_needed(answer).items():
            if not runner.fits(num_tokens, num_seats):
                problem = f"{num_seats} sequences of up to {num_tokens} tokens do not fit into the engine's cache"
                remedy = "a shorter prompt, fewer max_tokens or choices, or a larger kv_cache_bytes of the engine"
                raise ContextLengthError(f"{problem}: {remedy}", param="max_tokens", code="kv_cache_exceeded")
        for member in answer.members.values():
            member.join()
        insort(self.waiting, answer, key=lambda a: a.due_s)

    def _leave(self, answer: Answer) -> None:
        """Forget an answer and give back what it holds."""
        for choice in answer.choices:
            self._unseat(choice)
        (self.running if answer in self.running else self.waiting).remove(answer)
        for member in answer.members.values():
            member.leave()

    def _unseat(self, choice: Choice) -> None:
        for member, seat in choice.seats.items():
            choice.answer.members[member].runner.close(seat)
        choice.seats = {}

    def _fail(self, answer: Answer, error: Exception) -> None:
        self._leave(answer)
        self.outbox.append((answer, error))

    def fail_all(self, error: Exception) -> None:
        """End every answer with an error."""
        for answer in [*self.running, *self.waiting]:
            self._fail(answer, error)

    # ---- a step

    def step(self) -> bool:
        """One step for everybody; False when there is nothing to do."""
        self._drop_ended()
        self._admit()
        pieces = self._run(self._plan())
        self._choose([piece for piece in pieces if self._take_in(piece)])
        self.num_steps += 1
        return bool(self.running or self.waiting)

    def _drop_ended(self) -> None:
        now_s = time.monotonic()
        for answer in [*self.running, *self.waiting]:
            deadline_s = answer.request.deadline_s
            if answer.cancelled:
                self._leave(answer)
            elif deadline_s is not None and now_s - answer.received_s > deadline_s:
                answer.degraded = "ended by its deadline"
                self._end_now(answer)

    def _admit(self) -> None:
        """Let waiting answers in, in order, while there is room for all that they must run first.

        One that must wait keeps later ones from its members' memory, so that it is not overtaken there for ever.
        """
        blocked: set[int] = set()
        num_choices = sum(len(a.unfinished) for a in self.running)
        for answer in list(self.waiting):
            runners = {id(m.runner) for m in answer.members.values()}
            if runners & blocked:
                blocked |= runners
                continue
            if num_choices + answer.request.num_choices > self.max_answers:
                break
            if not self._enter(answer):
                blocked |= runners
                continue
            num_choices += answer.request.num_choices
            self.waiting.remove(answer)
            insort(self.running, answer, key=lambda a: a.due_s)

    def _enter(self, answer: Answer) -> bool:
        """Open the seats of an answer, with room for what it has to run; without, nothing is opened."""
        for choice in answer.unfinished:
            if not self._seat(choice):
                break
        else:
            held: dict[Runner, list[Any]] = {}
            for choice in answer.unfinished:
                for member, seat in choice.seats.items():
                    held.setdefault(answer.members[member].runner, []).append(seat)
            longest = max((self._target(choice) for choice in answer.unfinished), default=0)
            if all(runner.has_room(seats, longest) for runner, seats in held.items()):
                return True
        for choice in answer.choices:
            self._unseat(choice)
        return False

    @staticmethod
    def _target(choice: Choice) -> int:
        """Tokens that must have been run before the choice gets its next one, or is done."""
        return len(choice.tokens) if choice.num_generated else choice.answer.num_to_run

    def _seat(self, choice: Choice) -> bool:
        """Open the seats that a choice lacks, as far as there is room for them."""
        answer = choice.answer
        need_scores = not answer.is_prompt_scored
        max_shared = max(0, self._target(choice) - 1)
        if answer.want == "hidden" or (need_scores and (len(answer.members) > 1 or answer.request.prompt_logprobs)):
            max_shared = 0  # what is wanted of those tokens is not kept with their pages
        for member in answer.members:
            if member in choice.seats:
                continue
            loaded = answer.members[member]
            seat = loaded.runner.open(loaded.slot, loaded.key, choice.tokens, max_shared, need_scores)
            if seat is None:
                return False
            choice.seats[member] = seat
            if need_scores and seat.num_known:
                answer.prompt_logprobs = [entry for page in seat.scores for entry in page][: seat.num_known]
        return True

    # ---- what is run

    def _plan(self) -> list[Piece]:
        """The step's work: first those who only lack their last token, then prompts, in order, as far as tokens go."""
        self._left = self.max_batch_tokens
        planned: dict[Choice, Piece] = {}
        choices = [choice for answer in self.running for choice in answer.unfinished]
        later: list[Choice] = []
        for choice in choices:
            if self._behind(choice) == 1:
                self._plan_choice(choice, planned)
            else:
                later.append(choice)
        for choice in later:
            if self._left > 0:
                self._plan_choice(choice, planned)
        return list(planned.values())

    def _behind(self, choice: Choice) -> int:
        """Tokens that the member which lacks most has to run."""
        seats, target = choice.seats, self._target(choice)
        if len(seats) < len(choice.answer.members):
            return target
        return target - min(int(seat.num_known) for seat in seats.values())

    def _plan_choice(self, choice: Choice, planned: dict[Choice, Piece]) -> None:
        answer = choice.answer
        if answer not in self.running:  # it has just given its memory to another
            return
        if len(choice.seats) < len(answer.members) and not self._seat(choice):
            self._preempt(answer, planned)
            return
        known = {member: choice.seats[member].num_known for member in answer.members}
        start = min(known.values())
        target = self._target(choice)
        if start >= target:  # a prompt of one token that is only looked at
            self._end_now(answer)
            return
        members = tuple(member for member, has in known.items() if has == start)
        # Those that lack more catch up first; from then on all of them run the same tokens in the same step.
        stop = min([target, *(has for has in known.values() if has > start)])
        stop = min(stop, start + max(1, self._left // len(members)))
        for member in members:
            while not answer.members[member].runner.extend(choice.seats[member], stop):
                victim = self._last_in(answer.members[member].runner)
                if victim is answer and stop - start > 1:
                    stop = start + (stop - start) // 2  # a long piece holds pages that a window soon gives back
                    continue
                self._preempt(victim, planned)
                if victim is answer:
                    return
        tokens = choice.tokens[start:stop]
        want = self._want(choice, stop, is_whole=len(members) == len(answer.members))
        work = tuple(Work(choice.seats[member], start, tokens, want) for member in members)
        planned[choice] = Piece(choice, start, stop, members, work)
        self._left -= len(tokens) * len(members)

    @staticmethod
    def _want(choice: Choice, stop: int, *, is_whole: bool) -> Any:
        answer = choice.answer
        if answer.want == "hidden":
            return "hidden"
        if not is_whole:
            return "none"
        if not answer.is_prompt_scored:
            return "all"
        return "last" if stop == len(choice.tokens) else "none"

    def _last_in(self, runner: Runner) -> Answer:
        """Of the answers that hold memory of a runner, the one whose turn comes last."""
        return next(
            answer
            for answer in reversed(self.running)
            if any(answer.members[m].runner is runner for choice in answer.choices for m in choice.seats)
        )

    def _preempt(self, answer: Answer, planned: dict[Choice, Piece]) -> None:
        """Back to waiting with the tokens it has; what it holds is given back."""
        self.num_preemptions += 1
        for choice in answer.choices:
            self._unseat(choice)
            piece = planned.pop(choice, None)
            if piece is not None:
                self._left += (piece.stop - piece.start) * len(piece.members)
        self.running.remove(answer)
        insort(self.waiting, answer, key=lambda a: a.due_s)
        if not answer.is_prompt_scored:
            answer.prompt_logprobs = []
        answer.hidden_sum = None

    def _run(self, pieces: Sequence[Piece]) -> list[Piece]:
        """One pass of every runner that has work; hidden states are passes of their own. Returns what was run.

        A pass that fails ends the answers that are in it, and no others.
        """
        batches: dict[tuple[Runner, bool], list[tuple[int, int]]] = {}
        for number, piece in enumerate(pieces):
            for place, member in enumerate(piece.members):
                runner = piece.choice.answer.members[member].runner
                batches.setdefault((runner, piece.work[place].want == "hidden"), []).append((number, place))
        found: dict[tuple[int, int], tuple[Tensor, int, int]] = {}
        failed: set[Answer] = set()
        for (runner, _), places in batches.items():
            try:
                rows, bounds = runner.run([pieces[number].work[place] for number, place in places])
            except Exception as error:
                log.exception("a pass failed; the answers in it end with this error")
                for answer in {pieces[number].choice.answer for number, _ in places} - failed:
                    self._fail(answer, error)
                    failed.add(answer)
                continue
            for where, (begin, end) in zip(places, bounds, strict=True):
                found[where] = rows, begin, end
        for number, piece in enumerate(pieces):
            if piece.choice.answer not in failed:
                piece.rows = tuple(found[number, place] for place in range(len(piece.members)))
        return [piece for piece in pieces if piece.choice.answer not in failed]

    # ---- what comes of it

    def _take_in(self, piece: Piece) -> bool:
        """Note that a piece's tokens have been run; whether its choice is to get a token now."""
        choice, answer = piece.choice, piece.choice.answer
        is_last = piece.stop == len(choice.tokens)
        known = choice.tokens if is_last else choice.tokens[: piece.stop]
        scores = None
        if piece.work[0].want == "all":
            scores = self._score_prompt(piece)
        for member in piece.members:
            answer.members[member].runner.advance(choice.seats[member], known, scores)
        if piece.work[0].want == "hidden":
            rows, begin, end = piece.rows[0]
            total_D = rows[begin:end].sum(0)
            answer.hidden_sum = total_D if answer.hidden_sum is None else answer.hidden_sum + total_D
            if is_last:
                self._give(answer, answer.hidden_sum / len(choice.tokens))
            return False
        if piece.stop < self._target(choice) or len(piece.members) < len(answer.members):
            return False
        if answer.want == "next":
            self._give(answer, self._logits([piece], [0])[0].log_softmax(-1))
            return False
        if answer.max_tokens == 0:
            self._end_now(answer)
            return False
        return True

    def _give(self, answer: Answer, result: Tensor) -> None:
        self._leave(answer)
        self.outbox.append((answer, result.cpu()))

    def _score_prompt(self, piece: Piece) -> dict[int, Any] | None:
        """Log-probabilities of the prompt tokens that follow a piece's; returns them by page, to be kept with it."""
        answer, prompt = piece.choice.answer, piece.choice.answer.request.tokens
        first = len(answer.prompt_logprobs) + 1  # the prompt token whose log-probability comes next
        last = min(piece.stop, len(prompt) - 1)
        if first <= last:
            offsets = range(first - 1 - piece.start, last - piece.start)
            logits_CV = self._logits([piece] * len(offsets), offsets)
            num_top = [answer.request.prompt_logprobs or 0] * len(offsets)
            answer.prompt_logprobs += logprobs_of(logits_CV, prompt[first : last + 1], num_top)
        return answer.prompt_pages(piece.stop)

    def _logits(self, pieces: Sequence[Piece], offsets: Sequence[int]) -> Tensor:
        """One row of each piece, members mixed, as logits_BV: row `offset` of what the piece wanted."""
        singles = [n for n, piece in enumerate(pieces) if len(piece.members) == 1]
        if len(singles) == len(pieces):
            first = pieces[0].rows[0][0]
            index = [p.rows[0][1] + offset for p, offset in zip(pieces, offsets, strict=True)]
            if all(p.rows[0][0] is first for p in pieces):
                if index == list(range(len(first))):
                    return first
                return first[torch.tensor(index, device=first.device)]
            return torch.stack([p.rows[0][0][at] for p, at in zip(pieces, index, strict=True)])
        rows: list[Tensor] = [torch.empty(0)] * len(pieces)
        for n in singles:
            found, begin, _ = pieces[n].rows[0]
            rows[n] = found[begin + offsets[n]]
        by_size: dict[int, list[int]] = {}
        for n, piece in enumerate(pieces):
            if len(piece.members) > 1:
                by_size.setdefault(len(piece.members), []).append(n)
        for numbers in by_size.values():
            of_members = [
                torch.stack([found[begin + offsets[n]] for found, begin, _ in pieces[n].rows]) for n in numbers
            ]
            logprobs_CNV = torch.stack(of_members).log_softmax(-1)
            weights_CN = torch.tensor(
                [[pieces[n].choice.answer.weights[m] for m in pieces[n].members] for n in numbers]
            )
            mixed_CV = mix_logprobs(logprobs_CNV, weights_CN.to(logprobs_CNV.device))
            for n, row_V in zip(numbers, mixed_CV, strict=True):
                rows[n] = row_V
        return torch.stack(rows)

    def _choose(self, pieces: Sequence[Piece]) -> None:
        """A token for each choice whose members have spoken; all choices of a prompt that has just been read."""
        drawn: list[Choice] = []
        numbers: list[int] = []
        for number, piece in enumerate(pieces):
            mine = [piece.choice]
            answer = piece.choice.answer
            if len(answer.choices) < answer.request.num_choices:  # its prompt has just been read
                mine += self._fork(piece.choice)
            drawn += mine
            numbers += [number] * len(mine)
        drawn, numbers = self._constrained(drawn, numbers)
        if not drawn:
            return
        offsets = [piece.rows[0][2] - piece.rows[0][1] - 1 for piece in pieces]  # the last row of what was wanted
        logits_BV = self._logits(pieces, offsets)
        if numbers != list(range(len(pieces))):
            logits_BV = logits_BV[torch.tensor(numbers, device=logits_BV.device)]
        tokens = choose_all(logits_BV, [choice.row for choice in drawn])
        entries = self._entries(logits_BV, drawn, tokens)
        failed = {c.answer for c, token in zip(drawn, tokens, strict=True) if not c.row.may_take(token)}
        for answer in failed:
            self._fail(answer, UlmError("the model's scores are no numbers: no token follows from them"))
        for choice, token, entry in zip(drawn, tokens, entries, strict=True):
            if choice.answer not in failed:
                self._append(choice, token, entry)
        for answer in {id(choice.answer): choice.answer for choice in drawn}.values():
            if answer not in failed:
                self._send(answer)

    def _constrained(self, drawn: list[Choice], numbers: list[int]) -> tuple[list[Choice], list[int]]:
        """Those that get a token, told which they may take; an answer that cannot follow its schema ends with that."""
        failed: set[Answer] = set()
        for choice in drawn:
            if choice.constraint is not None and choice.answer not in failed:
                try:
                    choice.row.allowed = choice.constraint.allowed()
                except RequestError as error:
                    self._fail(choice.answer, error)
                    failed.add(choice.answer)
        if not failed:
            return drawn, numbers
        kept = [n for n, choice in enumerate(drawn) if choice.answer not in failed]
        return [drawn[n] for n in kept], [numbers[n] for n in kept]

    def _fork(self, first: Choice) -> list[Choice]:
        made = first.answer.fork()
        for choice in made:
            for member, seat in first.seats.items():
                copy = first.answer.members[member].runner.fork(seat)
                if copy is None:  # it reads the prompt itself, when there is room
                    self._unseat(choice)
                    break
                choice.seats[member] = copy
        return made

    @staticmethod
    def _entries(logits_BV: Tensor, drawn: Sequence[Choice], tokens: Sequence[int]) -> list[TokenLogprob | None]:
        """Log-probabilities of the chosen tokens, for those who want them."""
        entries: list[TokenLogprob | None] = [None] * len(drawn)
        requests = [choice.answer.request for choice in drawn]
        wanting = [n for n, r in enumerate(requests) if r.num_top_logprobs is not None or r.num_choices > r.n]
        if wanting:
            some_BV = logits_BV[torch.tensor(wanting, device=logits_BV.device)]
            num_top = [requests[n].num_top_logprobs or 0 for n in wanting]
            for n, entry in zip(wanting, logprobs_of(some_BV, [tokens[n] for n in wanting], num_top), strict=True):
                entries[n] = entry
        return entries

    def _append(self, choice: Choice, token: int, entry: TokenLogprob | None) -> None:
        answer = choice.answer
        if token == answer.tokenizer.eot_id:
            self._finish(choice, "stop")
            return
        if choice.constraint is not None:
            choice.constraint.append(token)
        choice.tokens.append(token)
        self.num_generated_tokens += 1
        choice.row.append(token)
        choice.held_tokens.append(token)
        choice.held_text += choice.text.push(token)
        if entry is not None:
            choice.logprob_sum += entry.logprob
            if answer.request.num_top_logprobs is not None:
                choice.held_logprobs.append(entry)
        if choice.text.stopped or (choice.constraint is not None and choice.constraint.is_whole):
            self._finish(choice, "stop")
        elif choice.num_generated >= answer.num_to_reach:
            self._finish(choice, "length")

    # ---- what is sent

    def _finish(self, choice: Choice, reason: str) -> None:
        """End a choice: its memory is free at once."""
        choice.finish_reason = reason
        choice.held_text += choice.text.finish()
        self._unseat(choice)

    def _end_now(self, answer: Answer) -> None:
        """The end of an answer with what there is: its time is over, or it asked for its prompt alone."""
        if len(answer.choices) < answer.request.num_choices:
            answer.fork()
        for choice in answer.unfinished:
            self._finish(choice, "length")
        self._send(answer)

    def _send(self, answer: Answer) -> None:
        """Chunks of what is new: of each choice in a stream, else all at the answer's end; then the answer is gone."""
        has_ended = not answer.unfinished
        if not has_ended and not answer.request.stream:
            return
        chosen = answer.best() if has_ended else answer.choices
        chunks = [
            choice.take_chunk(index)
            for index, choice in enumerate(chosen)
            if choice.held_text or choice.held_tokens or (choice.finish_reason and not choice.is_sent)
        ]
        for choice in chosen:
            choice.is_sent = choice.finish_reason is not None
        if chunks and not answer.prompt_sent:
            chunks[0] = replace(chunks[0], prompt_logprobs=tuple(answer.prompt_logprobs))
            answer.prompt_sent = True
        if has_ended:
            chunks[-1] = replace(chunks[-1], degraded=answer.degraded)
            if answer in self.running or answer in self.waiting:
                self._leave(answer)
        self.outbox += [(answer, chunk) for chunk in chunks]


def _seats_needed(answer: Answer) -> dict[Runner, int]:
    """Sequences that an answer can hold at once with each runner."""
    needed: dict[Runner, int] = {}
    for loaded in answer.members.values():
        needed[loaded.runner] = needed.get(loaded.runner, 0) + answer.request.num_choices
    return needed
