"""Batches of a worker, made one step ahead in a thread."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from ulm.corpus.order import Order, batch_digest
from ulm.corpus.rows import RowPlan

ROWS_AHEAD = 2048  # positions of the order computed at once: a call for one batch takes as long as for many


@dataclass(frozen=True)
class WorkerBatch:
    """One worker's rows of a global batch, and what is true of the whole batch."""

    inputs_BT: Tensor
    targets_BT: Tensor
    segments_BT: Tensor  # of each row, on the CPU: most models do not look at them
    num_targets: int  # of the global batch
    digest: str  # of the global batch's rows


class Feed:
    """Global batches from a cursor on; worker `rank` of `world_size` gets every world_size-th row from rank on."""

    def __init__(
        self,
        plan: RowPlan,
        order: Order,
        rows_per_batch: int,
        *,
        cursor: int,
        rank: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        self._plan, self._order, self._rows_per_batch, self._cursor = plan, order, rows_per_batch, cursor
        self._rank, self._world_size, self._device = rank, world_size, device
        self._ahead = np.zeros(0, np.int64)  # rows from the cursor of the batch to make next
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="feed")
        self._next: Future[WorkerBatch] = self._thread.submit(self._make, cursor)

    def next(self) -> WorkerBatch:
        """The batch at the cursor, which moves on."""
        batch = self._next.result()
        self._cursor += self._rows_per_batch
        self._next = self._thread.submit(self._make, self._cursor)
        return batch

    def _make(self, cursor: int) -> WorkerBatch:
        if not len(self._ahead):
            batches = max(1, ROWS_AHEAD // self._rows_per_batch)
            self._ahead = self._order.rows(cursor, batches * self._rows_per_batch)
        rows, self._ahead = np.split(self._ahead, [self._rows_per_batch])
        mine = self._plan.batch(rows[self._rank :: self._world_size])
        inputs_BT, targets_BT = (self._to_device(torch.from_numpy(x)) for x in (mine.inputs_BT, mine.targets_BT))
        segments_BT = torch.from_numpy(mine.segments_BT)
        return WorkerBatch(
            inputs_BT, targets_BT, segments_BT, int(self._plan.num_targets(rows).sum()), batch_digest(rows)
        )

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else tensor

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)
