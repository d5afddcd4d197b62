"""The training loop: it owns the model, the order of the rows and the step, and knows nothing of Ray.

One process calls `train` by itself; several call it together, each with its rank, inside a torch process group.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipelines.train import folder, validation
from pipelines.train.feed import Feed, WorkerBatch
from pipelines.train.figures import MetricsFile, StepFigures
from pipelines.train.task import TrainTask
from ulm import registry, runtime
from ulm.checkpoints import store
from ulm.components.loss import summed_nats
from ulm.corpus.manifest import Corpus
from ulm.corpus.order import Order
from ulm.corpus.rows import RowPlan
from ulm.errors import ConfigError, TrainingError
from ulm.models.decoder import build

log = logging.getLogger(__name__)

KEEP_CHECKPOINTS = 5  # of a run; older ones are removed
# Activations that the backward pass needs, per token, layer and unit of d_model, with room for the feed-forward layer.
ACTIVATION_BYTES = 120
CPU_ACTIVATIONS = 512e6  # keeps several runs side by side on one small machine


@dataclass(frozen=True)
class Result:
    """Where a run stands: its step, its newest checkpoint, and whether it was asked to stop before its end."""

    step: int
    checkpoint: Path | None
    stopped: bool = False


class Objective(nn.Module):
    """Model and loss in one forward, so that DistributedDataParallel sees both."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Summed nats of a micro-batch."""
        return summed_nats(self.model.hidden(inputs_BT), targets_BT, self.model.head, self.model.vocab_size)


def train(
    task: TrainTask,
    *,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | None = None,
    on_step: Callable[[StepFigures], None] = lambda figures: None,
    on_checkpoint: Callable[[Path], None] = lambda path: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Result:
    """Train to the task's last step, from the run's newest whole checkpoint if there is one.

    Every rank calls `on_checkpoint` after each save; only rank 0 writes and calls `on_step`. `should_stop` on any
    rank makes all of them save after the step they are in and return. TrainingError when the loss is not finite.
    """
    if rank == 0:
        folder.claim(task)
    if folder.is_finished(task):
        return Result(task.num_steps, store.newest(task.folder))
    run = _Run.open(task, rank, world_size, device or runtime.device())
    with ExitStack() as stack:
        metrics = stack.enter_context(MetricsFile(task.folder, run.step)) if rank == 0 else None
        feed = stack.enter_context(run.feed())
        stopped = run.any_rank(should_stop())
        while run.step < task.num_steps and not stopped:
            figures, stop = run.take_step(feed, should_stop)
            if metrics is not None:
                metrics.write(figures)
                on_step(figures)
            stopped = stop and run.step < task.num_steps
            if stopped or run.step == task.num_steps or _due(run.step, task.checkpoint_every_steps):
                on_checkpoint(run.save())
    return Result(run.step, store.newest(task.folder), stopped)


@dataclass
class _Run:
    """The state of one rank between two steps."""

    task: TrainTask
    rank: int
    world_size: int
    device: torch.device
    corpus: Corpus
    plan: RowPlan
    order: Order
    model: Any
    optimizer: torch.optim.Optimizer
    objective: Any  # Objective, or DistributedDataParallel of it
    held_out: validation.HeldOut | None
    init_digest: str | None
    step: int = 0
    tokens: int = 0
    clock: float = field(default_factory=time.perf_counter)  # when the step under way began

    @classmethod
    def open(cls, task: TrainTask, rank: int, world_size: int, device: torch.device) -> _Run:
        """Plan, model and optimizer, where the newest whole checkpoint left them."""
        if task.rows_per_batch % world_size:
            problem = f"{world_size} workers cannot share the {task.rows_per_batch} rows of a global batch equally"
            raise ConfigError("train.workers", problem, "a divisor of batch_tokens / context_tokens")
        corpus, documents, context_tokens = (
            Corpus.open(str(task.corpus), verify=False),
            task.chosen_documents(),
            task.spec.context_tokens,
        )
        plan = RowPlan.make(corpus, "train", context_tokens=context_tokens, seed=task.seed, documents=documents)
        if not plan.num_rows:
            raise ConfigError("corpus", f"{task.corpus} has no training documents among those chosen", "give it some")
        val = RowPlan.make(corpus, "val", context_tokens=context_tokens, documents=documents)
        model = build(task.spec, seed=task.seed).to(device)
        lr = task.optimizer.lr  # type: ignore[attr-defined]
        optimizer = registry.find("optimizer", task.optimizer.kind).build(task.optimizer, model, lr)
        objective: nn.Module = Objective(model)
        if world_size > 1:
            objective = DistributedDataParallel(objective, device_ids=[device] if device.type == "cuda" else None)
        run = cls(
            task, rank, world_size, device, corpus, plan, Order(plan.classes, task.seed), model, optimizer, objective,
            validation.HeldOut.of(val, corpus.tokenizer, task.eval_tokens),
            store.load_weights(model, task.init_from).digest if task.init_from else None,
        )  # fmt: skip
        run._resume()
        log.info(
            "%s: %d rows, %.1f %% padding, from step %d", task.run, plan.num_rows, 100 * plan.padding_share, run.step
        )
        return run

    def _resume(self) -> None:
        newest = store.newest(self.task.folder)
        if newest is None:
            return
        state = store.load_training(self.model, self.optimizer, newest)
        self.step, self.tokens = state["step"], state["tokens"]
        assert state["cursor"] == self.cursor, "a run folder of another identity; the job checks that"

    @property
    def cursor(self) -> int:
        """Rows taken so far, as a position in the order."""
        return self.task.start_cursor + self.step * self.task.rows_per_batch

    def feed(self) -> Feed:
        """Batches from the cursor on."""
        return Feed(
            self.plan, self.order, self.task.rows_per_batch,
            cursor=self.cursor, rank=self.rank, world_size=self.world_size, device=self.device,
        )  # fmt: skip

    def take_step(self, feed: Feed, should_stop: Callable[[], bool]) -> tuple[StepFigures, bool]:
        """One update and, when due, an evaluation. Also whether any rank was asked to stop."""
        task, asked = self.task, time.perf_counter()
        batch = feed.next()
        waited_s = time.perf_counter() - asked
        # Random numbers (dropout) are a function of seed, step and rank: nothing to store, nothing to replay.
        torch.manual_seed(_seed(task.seed, self.step, self.rank))
        schedule = registry.find("schedule", task.schedule.kind)
        lr = task.optimizer.lr * schedule.share(task.schedule, self.step, task.num_steps)  # type: ignore[attr-defined]
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        nats = self._gradients(batch)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), task.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        sums = torch.stack([nats, torch.tensor(float(should_stop()), device=self.device)])
        if self.world_size > 1:
            dist.all_reduce(sums)
        total_nats, stops, grad_norm = torch.cat(
            [sums, norm.detach().float().reshape(1)]
        ).tolist()  # the step's one sync
        loss = total_nats / batch.num_targets
        self.step += 1
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise self._not_finite(loss, grad_norm)
        self.tokens += batch.num_targets
        rate = self._rate(batch.num_targets)
        held_out = self._evaluate()
        return StepFigures(
            self.step, loss, self.tokens, batch.num_targets, rate, batch.digest, lr, grad_norm, waited_s, *held_out
        ), stops > 0

    def _gradients(self, batch: WorkerBatch) -> Tensor:
        """Accumulate the gradient of the global batch's mean loss; returns this worker's summed nats."""
        scale = self.world_size / batch.num_targets  # DistributedDataParallel takes the mean over workers
        parts = list(self._micro_batches(batch))
        total = torch.zeros((), device=self.device)
        for number, (inputs_BT, targets_BT) in enumerate(parts):
            last = number == len(parts) - 1
            with nullcontext() if last or self.world_size == 1 else self.objective.no_sync():
                with self._precision():
                    nats = self.objective(inputs_BT, targets_BT)
                (nats * scale).backward()
            total += nats.detach()
        return total

    def _micro_batches(self, batch: WorkerBatch) -> Iterator[tuple[Tensor, Tensor]]:
        spec = self.task.spec
        per_row = ACTIVATION_BYTES * spec.num_layers * spec.d_model * spec.context_tokens
        room = 0.5 * torch.cuda.mem_get_info(self.device)[1] if self.device.type == "cuda" else CPU_ACTIVATIONS
        rows = self.task.micro_batch_rows or max(1, int(room / per_row))
        return zip(batch.inputs_BT.split(rows), batch.targets_BT.split(rows), strict=True)

    def _precision(self) -> torch.autocast:
        wanted = self.task.precision
        bfloat16 = wanted == "bfloat16" or (wanted == "auto" and runtime.has_fast_bfloat16(self.device))
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bfloat16)

    def _evaluate(self) -> tuple[float | None, float | None]:
        due = self.step == self.task.num_steps or _due(self.step, self.task.eval_every_steps)
        if not due or self.held_out is None:
            return None, None
        with self._precision():
            sums = self.held_out.score(self.model, self.device, self.rank, self.world_size).to(self.device)
        if self.world_size > 1:
            dist.all_reduce(sums)
        self.clock = time.perf_counter()
        return validation.figures(sums)

    def any_rank(self, mine: bool) -> bool:
        """Whether it is true on any rank."""
        flag = torch.tensor(float(mine), device=self.device)
        if self.world_size > 1:
            dist.all_reduce(flag)
        return flag.item() > 0

    def save(self) -> Path:
        """A training checkpoint of this step, written by rank 0; returns its folder."""
        place = store.step_folder(self.task.folder, self.step)
        if self.rank == 0:
            state = {
                "step": self.step,
                "tokens": self.tokens,
                "cursor": self.cursor,
                "rng": {"seed": self.task.seed, "step": self.step},  # all there is: see take_step
                "schedule": self.task.schedule.model_dump(mode="json"),
                "num_steps": self.task.num_steps,
            }
            store.save(
                self.model, self.corpus.tokenizer, place, step=self.step, run=self.task.run,
                corpus_digest=self.corpus.digest, init_from=self.init_digest, optimizer=self.optimizer, state=state,
            )  # fmt: skip
            store.prune(self.task.folder, KEEP_CHECKPOINTS)
        self.clock = time.perf_counter()
        return place

    def _rate(self, tokens: int) -> float:
        """Tokens per second since the step before ended, logging included, evaluation and saving not."""
        seconds = time.perf_counter() - self.clock
        self.clock += seconds
        return tokens / seconds

    def _not_finite(self, loss: float, grad_norm: float) -> TrainingError:
        newest = store.newest(self.task.folder)
        kept = f"the last checkpoint is {newest}" if newest else "there is no checkpoint yet"
        return TrainingError(
            f"{self.task.run}: step {self.step}: loss {loss}, gradient norm {grad_norm}: not finite; {kept}; "
            "a lower optimizer.lr or a longer warm-up usually helps"
        )


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _seed(*parts: int) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "little")
