"""A loaded member: a model, and the rows of its KV cache that answers under way sit on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ulm.components.cache import Cache
from ulm.models.decoder import Decoder
from ulm.tokenizers.tokenizer import Tokenizer

if TYPE_CHECKING:
    from serve.engines.local.answer import Answer


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
