"""One worker's share of a run between two steps: model, optimizer, order and step, opened, resumed, saved."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipelines.train.feed import Feed
from pipelines.train.task import TrainTask
from pipelines.train.validation import HeldOut
from ulm import registry
from ulm.checkpoints import store
from ulm.components.loss import summed_nats
from ulm.corpus.manifest import Corpus
from ulm.corpus.order import Order
from ulm.corpus.rows import RowPlan
from ulm.errors import ConfigError
from ulm.models.decoder import build

log = logging.getLogger(__name__)

KEEP_CHECKPOINTS = 5  # of a run; older ones are removed


class Objective(nn.Module):
    """Model and loss in one forward, so that DistributedDataParallel sees both."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Summed nats of a micro-batch."""
        return summed_nats(self.model.hidden(inputs_BT), targets_BT, self.model.head, self.model.vocab_size)


@dataclass
class Run:
    """What a rank holds. `step` updates have been made, on `tokens` targets."""

    task: TrainTask
    rank: int
    world_size: int
    device: torch.device
    corpus: Corpus
    plan: RowPlan
    model: Any
    optimizer: torch.optim.Optimizer
    objective: Any  # Objective, or DistributedDataParallel of it
    held_out: HeldOut | None
    init_digest: str | None
    step: int = 0
    tokens: int = 0

    @classmethod
    def open(cls, task: TrainTask, rank: int, world_size: int, device: torch.device) -> Run:
        """The run where its newest whole checkpoint left it, else at its beginning."""
        if task.rows_per_batch % world_size:
            problem = f"{world_size} workers cannot share the {task.rows_per_batch} rows of a global batch equally"
            raise ConfigError("train.workers", problem, "a divisor of batch_tokens / context_tokens")
        corpus, documents = Corpus.open(str(task.corpus), verify=False), task.chosen_documents()
        context_tokens = task.spec.context_tokens
        plan = RowPlan.make(corpus, "train", context_tokens=context_tokens, seed=task.seed, documents=documents)
        if not plan.num_rows:
            raise ConfigError("corpus", f"{task.corpus} has no training documents among those chosen", "give it some")
        val = RowPlan.make(corpus, "val", context_tokens=context_tokens, documents=documents)
        model = build(task.spec, seed=task.seed).to(device)
        init_digest = store.load_weights(model, task.init_from).digest if task.init_from else None
        lr = task.optimizer.lr  # type: ignore[attr-defined]
        optimizer = registry.find("optimizer", task.optimizer.kind).build(task.optimizer, model, lr)
        held_out = HeldOut.of(val, corpus.tokenizer, task.eval_tokens)
        run = cls(
            task, rank, world_size, device, corpus, plan, model, optimizer, Objective(model), held_out, init_digest
        )
        run._resume()
        if world_size > 1:
            ids = [device] if device.type == "cuda" else None
            run.objective = DistributedDataParallel(run.objective, device_ids=ids)
        padding = 100 * plan.padding_share
        log.info("%s: %d rows, %.1f %% padding, from step %d", task.run, plan.num_rows, padding, run.step)
        return run

    def _resume(self) -> None:
        newest = store.newest(self.task.folder)
        if newest is None:
            return
        state = store.load_training(self.model, self.optimizer, newest)
        self.step, self.tokens = state["step"], state["tokens"]
        assert state["cursor"] == self.cursor, "a folder of another identity; folder.claim has checked that"

    @property
    def cursor(self) -> int:
        """Rows taken so far, as a position in the order."""
        return self.task.start_cursor + self.step * self.task.rows_per_batch

    def feed(self) -> Feed:
        """Batches from the cursor on."""
        return Feed(
            self.plan,
            Order(self.plan.classes, self.task.seed),
            self.task.rows_per_batch,
            cursor=self.cursor,
            rank=self.rank,
            world_size=self.world_size,
            device=self.device,
        )

    def add_over_ranks(self, sums: Tensor) -> Tensor:
        """The tensor, summed over all ranks in place."""
        if self.world_size > 1:
            dist.all_reduce(sums)
        return sums

    def save(self) -> Path:
        """The folder of this step's training checkpoint, which rank 0 writes."""
        place = store.step_folder(self.task.folder, self.step)
        if self.rank == 0:
            state = {
                "step": self.step,
                "tokens": self.tokens,
                "cursor": self.cursor,
                "rng": {"seed": self.task.seed, "step": self.step},  # all there is: loop.py seeds every step anew
                "schedule": self.task.schedule.model_dump(mode="json"),
                "num_steps": self.task.num_steps,
            }
            store.save(
                self.model,
                self.corpus.tokenizer,
                place,
                step=self.step,
                run=self.task.run,
                corpus_digest=self.corpus.digest,
                init_from=self.init_digest,
                optimizer=self.optimizer,
                state=state,
            )
            store.prune(self.task.folder, KEEP_CHECKPOINTS)
        return place
