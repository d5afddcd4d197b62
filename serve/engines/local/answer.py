"""A request under way: its choices, their tokens, and what was not sent yet."""

from __future__ import annotations

import math
import time
from typing import Any, Literal

from torch import Tensor

from serve.constrained import Constraint
from serve.contracts import GenerateRequest, TokenChunk, TokenLogprob
from serve.engines.local.members import Loaded
from serve.engines.local.paged import PAGE_TOKENS
from serve.engines.local.sampler import Row
from ulm.errors import RequestError
from ulm.models.generate import room
from ulm.models.text_stream import TextStream

PRIORITY_S = 10.0  # a unit of priority is worth so many seconds of waiting, so that nobody waits for ever
Want = Literal["text", "next", "hidden"]


class Choice:
    """One continuation of a request's prompt, and the seats it has with the members that it uses."""

    def __init__(self, answer: Answer, index: int) -> None:
        request = answer.request
        self.answer, self.index = answer, index
        self.tokens = [*request.tokens, *request.generated]
        self.text = TextStream(answer.tokenizer, request.stop)
        for token in request.generated:  # its certain text was sent before; what is held back belongs to what follows
            self.text.push(token)
        self.row = Row.of(request.sampling.choice(index), request.tokens, request.generated)
        self.constraint = None if answer.constraint is None else answer.constraint.copy()
        self.seats: dict[str, Any] = {}  # by member, of its runner
        self.finish_reason: str | None = None
        self.logprob_sum = 0.0
        # What was not sent yet.
        self.held_text = answer.echo_text
        self.held_tokens: list[int] = []
        self.held_logprobs: list[TokenLogprob] = []
        self.is_sent = False  # its end, too

    @property
    def num_generated(self) -> int:
        """Tokens of the answer so far, those that the request brought included."""
        return len(self.tokens) - len(self.answer.request.tokens)

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
        want: Want = "text",
        mailbox: Any = None,
        constraint: Constraint | None = None,
    ) -> None:
        """`members` are those with a weight, as they were when it came; by `mailbox` its owner finds it again.

        `constraint` is that of a choice that has the request's `generated`.
        """
        self.request, self.members, self.want, self.mailbox = request, members, want, mailbox
        self.constraint = constraint
        self.received_s = time.monotonic()
        self.due_s = self.received_s - PRIORITY_S * request.priority  # whose comes first, goes first
        total = math.fsum(request.weights[m] for m in members)
        self.weights = {m: request.weights[m] / total for m in members}
        self.tokenizer = next(iter(members.values())).tokenizer
        context_tokens = min(m.spec.context_tokens for m in members.values())
        num_prompt = len(request.tokens)
        if want != "text" or request.max_tokens == 0:
            room(num_prompt - 1, context_tokens)
            self.max_tokens = 0
        else:
            self.max_tokens = min(request.max_tokens, room(num_prompt + len(request.generated), context_tokens))
        # What follows the last token of a prompt that is only looked at is nobody's question.
        self.num_to_run = num_prompt if want != "text" or self.max_tokens else num_prompt - 1
        self.wants_prompt = request.prompt_logprobs is not None
        self.echo_text = self._echo() if request.echo else ""
        self.prompt_logprobs: list[TokenLogprob] = []  # of prompt tokens 1, 2, …, as far as they are known
        self.prompt_sent = False
        self.hidden_sum: Tensor | None = None
        self.degraded: str | None = None
        self.cancelled = False
        self.num_to_reach = len(request.generated) + self.max_tokens  # tokens of a choice at which it ends
        self.choices = [Choice(self, 0)]  # the others part from it when the prompt has been read
        if self.choices[0].text.stopped:
            raise RequestError("generated: this answer has ended, with a stop string", param="generated")

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
        """The other choices, made when the prompt has been read: they have no seats yet."""
        made = [Choice(self, index) for index in range(1, self.request.num_choices)]
        self.choices += made
        return made

    def best(self) -> list[Choice]:
        """The choices to give: all, or of more than n those whose tokens are likeliest on average, likeliest first."""
        if len(self.choices) <= self.request.n:
            return self.choices
        ranked = sorted(self.choices, key=lambda c: (-c.logprob_sum / max(1, c.num_generated), c.index))
        return ranked[: self.request.n]
