"""Loss on held-out text while training: nats per target, and bits per byte."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ulm.components.loss import NO_TARGET, nats_per_target
from ulm.corpus.order import Ints, Order, RowClass
from ulm.corpus.rows import RowPlan
from ulm.tokenizers.tokenizer import Tokenizer

ROWS_AT_ONCE = 8


@dataclass(frozen=True)
class HeldOut:
    """Rows of the val split: the same sample for every run on a corpus with the same context."""

    plan: RowPlan
    rows: Ints
    bytes_of_V: Tensor  # bytes that a token stands for; 0 for <|endoftext|>
    eot_id: int

    @classmethod
    def of(cls, plan: RowPlan, tokenizer: Tokenizer, max_tokens: int | None) -> HeldOut | None:
        """A sample of at least `max_tokens` targets where there are so many; None when the split is empty."""
        if not plan.num_rows:
            return None
        rows = Order([RowClass(0, plan.num_rows)], seed=0).rows(0, plan.num_rows)  # each once, whatever its weight
        if max_tokens is not None:
            rows = rows[: int(np.searchsorted(np.cumsum(plan.num_targets(rows)), max_tokens)) + 1]
        bytes_of_V = torch.tensor([len(b) for b in tokenizer.token_bytes])
        return cls(plan, rows, bytes_of_V, tokenizer.eot_id)

    @torch.no_grad()
    def score(self, model: Any, device: torch.device, rank: int, world_size: int) -> Tensor:
        """Sums of one worker: nats, targets, nats of text (without <|endoftext|>), bytes of text; add over workers."""
        sums = torch.zeros(4, dtype=torch.float64)
        mine = self.rows[rank::world_size]
        for start in range(0, len(mine), ROWS_AT_ONCE):
            batch = self.plan.batch(mine[start : start + ROWS_AT_ONCE])
            targets_BT = torch.from_numpy(batch.targets_BT)
            segments_BT = torch.from_numpy(batch.segments_BT).to(device) if model.sees_documents else None
            x_BTD = model.hidden(torch.from_numpy(batch.inputs_BT).to(device), segments_BT)
            nats_BT = nats_per_target(x_BTD, targets_BT.to(device), model.head, model.vocab_size).cpu().double()
            is_target, is_text = targets_BT != NO_TARGET, (targets_BT != NO_TARGET) & (targets_BT != self.eot_id)
            num_bytes = self.bytes_of_V[targets_BT[is_text]].sum()
            sums += torch.stack([nats_BT.sum(), is_target.sum(), nats_BT[is_text].sum(), num_bytes])
        return sums


def figures(sums: Tensor) -> dict[str, float | None]:
    """Nats per target and bits per byte from the workers' added sums; None where no byte was scored."""
    nats, targets, text_nats, text_bytes = sums.tolist()
    bits_per_byte = text_nats / (math.log(2) * text_bytes) if text_bytes else None
    return {"val_loss": nats / targets, "bits_per_byte": bits_per_byte}
