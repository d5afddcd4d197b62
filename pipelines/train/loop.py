"""The training loop: it owns the model, the order of the rows and the step, and knows nothing of Ray.

One process calls `train` by itself; several call it together, each with its rank, inside a torch process group.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.train import folder, validation
from pipelines.train.feed import Feed, WorkerBatch
from pipelines.train.figures import MetricsFile, StepFigures
from pipelines.train.run import Run
from pipelines.train.task import TrainTask
from ulm import registry, runtime
from ulm.checkpoints import store
from ulm.errors import TrainingError

# Activations that the backward pass needs, per token, layer and unit of d_model, with room for the feed-forward layer.
ACTIVATION_BYTES = 120
CPU_ACTIVATIONS = 512e6  # several runs go side by side on one small machine
GPU_SHARE = 0.5  # of the GPU's memory; weights, gradients and optimizer take the rest


@dataclass(frozen=True)
class Result:
    """Where a run stands: its step, its newest checkpoint, and whether it was asked to stop before its end."""

    step: int
    checkpoint: Path | None
    stopped: bool = False


def train(
    task: TrainTask,
    *,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | None = None,
    on_step: Callable[[StepFigures], None] = lambda figures: None,
    on_checkpoint: Callable[[Path], None] = lambda place: None,
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
    run = Run.open(task, rank, world_size, device or runtime.device())
    metrics = MetricsFile(task.folder, run.step) if rank == 0 else None
    with run.feed() as feed, metrics or nullcontext():
        clock = time.perf_counter()
        stopped = run.add_over_ranks(torch.tensor(float(should_stop()), device=run.device)).item() > 0
        while run.step < task.num_steps and not stopped:
            step, stop = _update(run, feed, should_stop)
            seconds = time.perf_counter() - clock  # since the step before ended: data, logging and Ray included
            held_out = _evaluate(run)
            if metrics is not None:
                figures = StepFigures(tokens_per_second=step["step_tokens"] / seconds, **step, **held_out)
                metrics.write(figures)
                on_step(figures)
            stopped = stop and run.step < task.num_steps
            saved = stopped or run.step == task.num_steps or _due(run.step, task.checkpoint_every_steps)
            if saved:
                on_checkpoint(run.save())
            clock = time.perf_counter() if saved or held_out else clock + seconds
    return Result(run.step, store.newest(task.folder), stopped)


def _update(run: Run, feed: Feed, should_stop: Callable[[], bool]) -> tuple[dict[str, Any], bool]:
    """One step of the optimizer, as fields of StepFigures, and whether any rank was asked to stop."""
    task, asked = run.task, time.perf_counter()
    batch = feed.next()
    data_wait_s = time.perf_counter() - asked
    # Random numbers (dropout) are a function of seed, step and rank: nothing to store, nothing to replay.
    torch.manual_seed(_seed(task.seed, run.step, run.rank))
    share = registry.find("schedule", task.schedule.kind).share(task.schedule, run.step, task.num_steps)
    lr = task.optimizer.lr * share  # type: ignore[attr-defined]
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    nats = _accumulate_gradients(run, batch)
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), task.clip_norm).detach().float()
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    sums = run.add_over_ranks(torch.stack([nats, torch.tensor(float(should_stop()), device=run.device)]))
    total_nats, stops, grad_norm = torch.cat([sums, norm.reshape(1)]).tolist()  # the step's one wait for the device
    run.step, run.tokens, loss = run.step + 1, run.tokens + batch.num_targets, total_nats / batch.num_targets
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise _not_finite(run, loss, grad_norm)
    return {
        "step": run.step,
        "loss": loss,
        "tokens": run.tokens,
        "step_tokens": batch.num_targets,
        "batch_digest": batch.digest,
        "lr": lr,
        "grad_norm": grad_norm,
        "data_wait_s": data_wait_s,
    }, stops > 0


def _accumulate_gradients(run: Run, batch: WorkerBatch) -> Tensor:
    """Gradient of the global batch's mean loss, micro-batch by micro-batch; returns this worker's summed nats."""
    scale = run.world_size / batch.num_targets  # DistributedDataParallel takes the mean over workers
    rows = run.task.micro_batch_rows or _rows_that_fit(run)
    parts = list(zip(torch.split(batch.inputs_BT, rows), torch.split(batch.targets_BT, rows), strict=True))
    total = torch.zeros((), device=run.device)
    for number, (inputs_BT, targets_BT) in enumerate(parts):
        is_last = number == len(parts) - 1
        with nullcontext() if is_last or run.world_size == 1 else run.objective.no_sync():
            with _precision(run):
                nats = run.objective(inputs_BT, targets_BT)
            (nats * scale).backward()
        total += nats.detach()
    return total


def _rows_that_fit(run: Run) -> int:
    spec = run.task.spec
    per_row = ACTIVATION_BYTES * spec.num_layers * spec.d_model * spec.context_tokens
    on_gpu = run.device.type == "cuda"
    room = GPU_SHARE * torch.cuda.get_device_properties(run.device).total_memory if on_gpu else CPU_ACTIVATIONS
    return max(1, int(room / per_row))


def _precision(run: Run) -> torch.autocast:
    wanted = run.task.precision
    bfloat16 = wanted == "bfloat16" or (wanted == "auto" and runtime.has_fast_bfloat16(run.device))
    return torch.autocast(run.device.type, dtype=torch.bfloat16, enabled=bfloat16)


def _evaluate(run: Run) -> dict[str, Any]:
    """val_loss and bits_per_byte where an evaluation is due, else nothing."""
    due = run.step == run.task.num_steps or _due(run.step, run.task.eval_every_steps)
    if not due or run.held_out is None:
        return {}
    with _precision(run):
        sums = run.held_out.score(run.model, run.device, run.rank, run.world_size)
    return validation.figures(run.add_over_ranks(sums.to(run.device)))


def _not_finite(run: Run, loss: float, grad_norm: float) -> TrainingError:
    newest = store.newest(run.task.folder)
    kept = f"the last checkpoint is {newest}" if newest else "there is no checkpoint yet"
    return TrainingError(
        f"{run.task.run}: step {run.step}: loss {loss}, gradient norm {grad_norm}: not finite; {kept}; "
        "a lower optimizer.lr or a longer warm-up usually helps"
    )


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _seed(*parts: int) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "little")
