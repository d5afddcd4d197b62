"""The training loop: it owns the model, the order of the rows and the step, and knows nothing of Ray.

One process calls `train` by itself; several call it together, each with its rank, inside a torch process group.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import math
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.train import events, folder, samples, validation
from pipelines.train.feed import Feed
from pipelines.train.figures import MetricsFile, StepFigures
from pipelines.train.guard import Rollbacks, Tripped
from pipelines.train.run import Run, agree
from pipelines.train.saver import full_disk_told
from pipelines.train.task import TrainTask
from pipelines.train.trackers import Trackers
from ulm import registry, runtime
from ulm.checkpoints import store
from ulm.errors import TrainingError, UlmError
from ulm.models.account import train_flops_per_token

LOG_EVERY_S = 30.0  # at most, but for evaluations
log = logging.getLogger(__name__)
SMALLEST_SCALE = 1e-4  # of a float16 loss; below, it is the model that is not finite, not the format


@dataclass(frozen=True)
class Result:
    """Where a run stands: its step, its newest checkpoint, and whether it was asked to stop before its end."""

    step: int
    checkpoint: Path | None
    stopped: bool = False


@dataclass(frozen=True)
class Edges:
    """What the loop tells those around it, and asks them."""

    on_step: Callable[[StepFigures], None]
    on_checkpoint: Callable[[Path], None]
    should_stop: Callable[[], bool]


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
    """Train to the task's last step, from the run's newest undamaged checkpoint if there is one.

    Only rank 0 writes, and calls `on_step`; every rank calls `on_checkpoint`, in the same step, once a checkpoint is
    whole. `should_stop` on any rank makes all of them save after the step they are in and return. A step that trips
    the guard sends all ranks back to a checkpoint, at a lower rate; TrainingError when that has happened too often, or
    when a checkpoint cannot be written.
    """
    edges, device = Edges(on_step, on_checkpoint, should_stop), device or runtime.device()
    folder.check_workers(task, range(world_size, world_size + 1))
    with ExitStack() as stack:
        if rank == 0:
            stack.enter_context(folder.held(task))
            folder.claim(task)
            stack.enter_context(folder.failure_told([task]))
            stack.enter_context(full_disk_told(task.folder))
        if agree(int(rank == 0 and folder.is_finished(task)), world_size, device):
            return Result(folder.newest_step(task)[1], store.newest(task.folder))
        so_far = None
        while True:
            done = _until_tripped(task, rank, world_size, device, edges, so_far)
            if isinstance(done, Result):
                return done
            so_far = done
            gc.collect()  # two models at a time may be more than the memory holds


def _until_tripped(
    task: TrainTask, rank: int, world_size: int, device: torch.device, edges: Edges, so_far: Rollbacks | None
) -> Result | Rollbacks:
    """How training ended; or the rollbacks so far, where the newest checkpoint is now one to go on from.

    TrainingError when the recipe allows no more of them.
    """
    run = Run.open(task, rank, world_size, device)
    run.rollbacks = so_far or run.rollbacks  # a checkpoint knows of those before it
    try:
        with run:
            return _train_on(run, edges)
    except Tripped as tripped:
        _go_back(run, tripped)
    return run.rollbacks


def _go_back(run: Run, tripped: Tripped) -> None:
    """Leave the checkpoint to go on from as the newest; TrainingError when that has been tried often enough."""
    config, newest = run.task.recipe.guard, store.newest(run.task.folder)
    run.rollbacks.trip(tripped.step, config.lr_factor)
    if run.rollbacks.times > config.rollbacks:
        kept = f"the last checkpoint is {newest}" if newest else "there is no checkpoint yet"
        remedy = "a lower optimizer.lr or a longer warm-up usually helps"
        raise TrainingError(f"{run.task.run}: step {tripped.step}: {tripped}; {kept}; {remedy}") from None
    if run.rank == 0:
        whole = store.whole_steps(run.task.folder)
        for bad in whole[max(0, len(whole) - run.rollbacks.checkpoints + 1) :]:
            store.remove(bad)
        newest = store.newest(run.task.folder)
        target = newest.name if newest else "the beginning"
        text = f"{tripped}; going back to {target}, from there with {run.rollbacks.lr_scale:g} of the rate"
        events.say(run.task.folder, tripped.step, "rollback", text)
    run.agree(0)


def _train_on(run: Run, edges: Edges) -> Result:
    """Train from where the run stands to its end, or until it is asked to stop. Raises Tripped."""
    task, is_first = run.task, run.rank == 0
    flops_per_token = train_flops_per_token(run.model, task.spec.context_tokens)
    peak_flops = runtime.peak_flops(run.device, run.updater.precision) * run.world_size if is_first else 0.0
    with ExitStack() as stack:
        feed = stack.enter_context(run.feed())
        metrics = stack.enter_context(MetricsFile(task.folder, run.step)) if is_first else None
        trackers = stack.enter_context(Trackers(task)) if is_first else None
        stopped = run.add_over_ranks(torch.tensor(float(edges.should_stop()), device=run.device)).item() > 0
        clock = logged_s = time.perf_counter()
        while run.step < task.num_steps and not run.ended and not stopped:
            step, asked = _update(run, feed, edges)
            seconds = time.perf_counter() - clock  # since the step before ended: data, logging and Ray included
            held_out = _evaluate(run)
            is_best = bool(held_out) and _is_best(run, held_out["val_loss"])
            if metrics is not None and trackers is not None:
                rate = step["step_tokens"] / seconds
                figures = StepFigures(
                    tokens_per_second=rate,
                    mfu=rate * flops_per_token / peak_flops,
                    memory_bytes=runtime.gpu_bytes() or runtime.rss_bytes(),
                    **step,
                    **held_out,
                )
                metrics.write(figures)
                trackers.step(figures)
                logged_s = _log(run, figures, logged_s)
                edges.on_step(figures)
            stopped = asked.stop and run.step < task.num_steps and not run.ended
            if asked.saved is not None:
                edges.on_checkpoint(asked.saved)
            is_last = stopped or run.step == task.num_steps or run.ended is not None
            due = _due(run.step, task.train.checkpoint_every_steps) or asked.save
            if is_last or due or (is_best and task.train.keep_best > 0):
                run.check_weights()
                run.save(held_out.get("val_loss"))
            sampled = is_first and _sample(run, trackers, evaluated=bool(held_out))
            clock = time.perf_counter() if held_out or sampled else clock + seconds
        run.saver.wait()
        saved = run.saver.done()
        if stopped and is_first:
            run.say("stop", "ended as it was asked to; the same command goes on from here")
    if step_saved := run.agree(store.step_of(saved) if saved else 0):  # when this returns it is whole for all ranks
        edges.on_checkpoint(store.step_folder(task.folder, step_saved))
    return Result(run.step, store.newest(task.folder), stopped)


def _log(run: Run, figures: StepFigures, logged_s: float) -> float:
    """A line for `ulm runs logs`: of the last step, of an evaluation, else now and then. When one was last written."""
    now_s = time.perf_counter()
    if now_s - logged_s < LOG_EVERY_S and figures.val_loss is None and figures.step < run.task.num_steps:
        return logged_s
    found = f"step {figures.step:,} of {run.task.num_steps:,}: loss {figures.loss:.4f}"
    found += "" if figures.val_loss is None else f", val_loss {figures.val_loss:.4f}"
    log.info("%s: %s, %.0f tokens/s", run.task.run, found, figures.tokens_per_second)
    return now_s


@dataclass(frozen=True)
class _Asked:
    """What came up in a step on any rank, known to all of them after it."""

    stop: bool  # save and return
    save: bool  # the clock says that it is time
    saved: Path | None  # this checkpoint is whole now


def _update(run: Run, feed: Feed, edges: Edges) -> tuple[dict[str, Any], _Asked]:
    """One step of the optimizer, as fields of StepFigures, and what was asked for meanwhile. Raises Tripped."""
    task, asked_s = run.task, time.perf_counter()
    batch = feed.next()
    data_wait_s = time.perf_counter() - asked_s
    # Random numbers (dropout) are a function of seed, step and rank: nothing to store, nothing to replay.
    runtime.seed(run.device, _seed(task.train.seed, run.step, run.rank))
    share = registry.find("schedule", task.schedule.kind).share(task.schedule, run.step, task.num_steps)
    lr_share = share * run.rollbacks.lr_scale
    nats, norm = run.updater.update(batch, lr_share)
    run.step, run.tokens = run.step + 1, run.tokens + batch.num_targets
    run.follow_average()
    sums = run.add_over_ranks(torch.cat([nats.double().reshape(1), _signals(run, edges).to(run.device)]))
    total, stop, save, saved, grad_norm = torch.cat([sums, norm.reshape(1)]).tolist()  # the step's one wait
    loss = total / batch.num_targets
    if run.updater.scaler.is_enabled() and math.isfinite(loss) and not math.isfinite(grad_norm):
        grad_norm = None  # no weight has changed: the scale of the loss was too large for float16
        if run.updater.scaler.get_scale() < SMALLEST_SCALE:
            raise Tripped(run.step, "no scale keeps the gradient finite in float16")
    else:
        run.watch.see(run.step, loss, grad_norm)
    return {
        "step": run.step,
        "loss": loss,
        "tokens": run.tokens,
        "step_tokens": batch.num_targets,
        "batch_digest": batch.digest,
        "lr": task.optimizer.lr * lr_share,  # type: ignore[attr-defined]
        "grad_norm": grad_norm,
        "data_wait_s": data_wait_s,
    }, _Asked(stop > 0, save > 0, store.step_folder(task.folder, int(saved)) if saved else None)


def _signals(run: Run, edges: Edges) -> Tensor:
    """What a rank has to tell the others: stop, save, and (of rank 0, the only writer) the step that is saved now."""
    saved = run.saver.done()
    by_the_clock = run.rank == 0 and run.task.train.checkpoint_every_steps is None and run.saver.is_due()
    step = 0 if saved is None else store.step_of(saved)
    return torch.tensor([edges.should_stop(), by_the_clock, step], dtype=torch.float64)  # float32 ends at step 2^24


def _evaluate(run: Run) -> dict[str, Any]:
    """val_loss and bits_per_byte where an evaluation is due, else nothing."""
    due = run.step == run.task.num_steps or _due(run.step, run.task.train.eval_every_steps)
    if not due or run.held_out is None:
        return {}
    with run.served_weights(), run.updater.autocast(), eagerly(run):
        sums = run.held_out.score(run.model, run.device, run.rank, run.world_size)
    found = validation.figures(run.add_over_ranks(sums.to(run.device)))
    if not math.isfinite(found["val_loss"] or 0.0):  # the update may have ruined the weights, after its own loss
        raise Tripped(run.step, f"val_loss {found['val_loss']}: not finite")
    return found


def eagerly(run: Run) -> Any:
    """A block in which compiled layers run as they are written: other shapes would be compiled anew."""
    return torch.compiler.set_stance("force_eager") if run.updater.compiled else nullcontext()


def _is_best(run: Run, val_loss: float) -> bool:
    """Take note of an evaluation; may end the run early."""
    early = run.task.recipe.early_stopping
    is_best = run.best.see(val_loss, run.step, early.min_improvement if early else 0.0)
    if early and run.best.evaluations_since >= early.patience and run.step < run.task.num_steps:
        run.ended = "early stopping"
        if run.rank == 0:
            best = f"the best is {run.best.val_loss:.4f} after step {run.best.step}"
            run.say("end", f"val_loss has not fallen for {early.patience} evaluations; {best}")
    return is_best


def _sample(run: Run, trackers: Trackers | None, *, evaluated: bool) -> bool:
    """Have the model write where that is due; whether it did."""
    config = run.task.recipe.samples
    due = evaluated if config.every_steps is None else _due(run.step, config.every_steps)
    if not due or not config.prompts or trackers is None:
        return False
    try:
        with run.served_weights(), eagerly(run):
            for sample in samples.write(run.task, run.step, run.model, run.rows.corpus.tokenizer):
                trackers.sample(sample)
    except UlmError as error:  # text to look at is no reason to lose steps
        run.say("samples", f"no samples: {error}")
    return True


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _seed(*parts: int) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "little")
