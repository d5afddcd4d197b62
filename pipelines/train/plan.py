"""What training by a recipe would take: memory, steps, time and disk, before anything is started or written."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pipelines.train import folder
from pipelines.train.alone import all_cores
from pipelines.train.feed import WorkerBatch
from pipelines.train.prepare import prepare
from pipelines.train.rows import Rows
from pipelines.train.saver import SPARE_BYTES
from pipelines.train.task import TrainTask
from pipelines.train.update import Updater, compiles
from ulm import registry, runtime
from ulm.checkpoints import store
from ulm.models.account import activation_bytes, num_parameters, on_meta, train_flops_per_token
from ulm.models.decoder import build
from ulm.recipes.train import TrainRecipe

MEASURE_S = 1.5  # a trial that is likely to take longer is made with fewer rows
LONGEST_S = 6.0  # a row that is likely to take longer is not tried
USUAL_MFU = 0.4  # share of the peak that training reaches where not even one row can be tried
COMPILED_SHARE = {"cpu": 0.96, "cuda": 0.5}  # of the eager time that a compiled model takes; see update.py
OPTIMAL_TOKENS = 20  # per parameter: the least loss for the operations spent (Chinchilla, arXiv 2203.15556)
MANY_EPOCHS = 4  # from here on repeated text teaches less and less (arXiv 2305.16264)
LISTED_WORKERS = 16


@dataclass(frozen=True)
class _Bytes:
    """What one worker holds, and what a checkpoint holds."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    activations_per_row: int
    checkpoint: int


def plan(recipe: TrainRecipe, *, root: Path, near: Path | None = None) -> dict[str, Any]:
    """The figures of `ulm train --plan`. Mistakes in the recipe are raised as training would raise them.

    Time is measured in a trial of some seconds on this machine, alone; memory is of one worker.
    """
    task = prepare(recipe, root=root, near=near)
    rows, device = Rows.of(task), runtime.device()
    workers = max(recipe.train.worker_counts)
    mine = replace(task, batch_tokens=task.batch_tokens // workers)  # what one worker has of a batch
    meta = on_meta(task.spec)
    flops_per_token = train_flops_per_token(meta, task.spec.context_tokens)
    precision = runtime.precision(task.train.precision, device)
    compiled = compiles(task, meta, device)
    peak_flops = runtime.peak_flops(device, precision)
    held = _bytes(task, precision)
    with all_cores():
        trial = _Trial(mine, rows, device, flops_per_token, peak_flops)
        step_s, measured = trial.step_s()
    step_s *= COMPILED_SHARE[device.type] if compiled and measured else 1.0
    side_by_side = min(workers, torch.cuda.device_count()) if device.type == "cuda" else 1  # CPUs are shared out
    step_s *= workers / side_by_side
    _, done = folder.newest_step(task)
    left = 0 if folder.is_finished(task) else task.num_steps - done
    slots = task.num_steps * task.batch_tokens
    tokens = round(slots * (1 - rows.plan.padding_share))
    parameters = num_parameters(meta)
    found = {
        "run": task.run,
        "steps": task.num_steps,
        "steps_done": task.num_steps - left,
        "parameters": parameters,
        "tokens": tokens,
        "tokens_per_parameter": tokens / parameters,
        "epochs": task.num_steps * task.rows_per_batch / rows.order.epoch_rows,
        "padding_share": rows.plan.padding_share,
        "batch": {
            "tokens": task.batch_tokens,
            "rows": task.rows_per_batch,
            "micro_batch_rows": trial.micro_batch_rows,
            "micro_batches": -(-mine.rows_per_batch // trial.micro_batch_rows),
        },
        "workers": workers,
        "workers_possible": [n for n in range(1, max(LISTED_WORKERS, workers) + 1) if task.rows_per_batch % n == 0],
        "device": _name(device),
        "precision": precision,
        "compile": compiled,
        "compile_why": _why(task, compiled, device),
        "memory": _memory(held, trial, device),
        "disk": _disk(task, held.checkpoint),
        "flops": flops_per_token * slots,
        "flops_per_token": flops_per_token,
        "peak_flops": peak_flops,
        "mfu": task.batch_tokens * flops_per_token / step_s / (peak_flops * side_by_side),
        "measured": measured,
        "seconds_per_step": step_s,
        "tokens_per_second": tokens / task.num_steps / step_s,
        "seconds": left * step_s + _evaluation_s(task, rows, step_s, left),
    }
    return {**found, "remarks": list(_remarks(found))}


def _with_optimizer(task: TrainTask, device: torch.device) -> tuple[Any, torch.optim.Optimizer]:
    """The model that the task trains, with fresh weights, and its optimizer."""
    model = build(task.spec, seed=task.train.seed)
    if device.type != "cpu":  # a model without data cannot be moved, not even to where it is
        model = model.to(device)
    if task.train.precision == "pure_bfloat16":
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    lr = task.optimizer.lr  # type: ignore[attr-defined]
    return model, registry.find("optimizer", task.optimizer.kind).build(task.optimizer, model, lr)


def _num_bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


def _bytes(task: TrainTask, precision: str) -> _Bytes:
    """Counted on a model and an optimizer that make one step without data."""
    with FakeTensorMode():
        model, optimizer = _with_optimizer(task, torch.device("cpu"))
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
        state = _num_bytes(value for values in optimizer.state.values() for value in values.values())
        gradients = _num_bytes(parameter.grad for parameter in model.parameters())
        weights = _num_bytes(store.tensors(model).values())
    average = weights if task.train.ema_decay is not None else 0
    per_row = activation_bytes(task.spec, precision, checkpoint=task.train.checkpoint_activations)
    return _Bytes(weights, gradients, state, average, per_row, checkpoint=weights + average + state)


class _Trial:
    """A step of the optimizer, tried on a device with real rows, or with some of them."""

    def __init__(
        self, task: TrainTask, rows: Rows, device: torch.device, flops_per_token: float, peak_flops: float
    ) -> None:
        eager = task.train.model_copy(update={"compile": False})  # compiling takes longer than the trial
        task = replace(task, recipe=task.recipe.model_copy(update={"train": eager}))
        self._task, self._rows, self._device = task, rows, device
        usual_row_s = flops_per_token * task.spec.context_tokens / (USUAL_MFU * peak_flops)
        self._usual_step_s = task.rows_per_batch * usual_row_s
        can_try = int(MEASURE_S / usual_row_s) or int(usual_row_s < LONGEST_S)
        with nullcontext() if can_try else FakeTensorMode():
            self._model, self._optimizer = _with_optimizer(task, device)
            self._updater = Updater(task, self._model, self._optimizer, device, world_size=1)
        self.micro_batch_rows = self._updater.micro_batch_rows
        self.rows_at_once = min(can_try, self.micro_batch_rows)  # of a micro-batch, in the trial

    def step_s(self) -> tuple[float, bool]:
        """Seconds of a step, and whether they were measured; a model of which not one row can be tried is not."""
        if not self.rows_at_once:
            return self._usual_step_s, False
        all_rows, first = self._task.rows_per_batch, self._batch(self.rows_at_once)
        first_s = self._timed(lambda: self._updater.update(first, 1.0))  # slower than the next: memory is new
        num_rows = min(all_rows, max(self.rows_at_once, int(MEASURE_S / first_s * self.rows_at_once)))
        if self.micro_batch_rows < num_rows < all_rows:
            num_rows -= num_rows % self.micro_batch_rows
        batch, times = self._batch(num_rows), 1 if first_s > MEASURE_S else 2
        trial_s = min(self._timed(lambda: self._updater.update(batch, 1.0)) for _ in range(times))
        if num_rows == all_rows:
            return trial_s, True
        for parameter in self._model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer_s = min(self._timed(self._optimizer.step) for _ in range(2))  # once a step, however many rows
        return max(0.0, trial_s - optimizer_s) * all_rows / num_rows + optimizer_s, True

    def _batch(self, num_rows: int) -> WorkerBatch:
        numbers = self._rows.order.rows(0, num_rows)
        batch = self._rows.plan.batch(numbers)
        inputs_BT, targets_BT = (torch.from_numpy(x).to(self._device) for x in (batch.inputs_BT, batch.targets_BT))
        segments_BT, num_targets = torch.from_numpy(batch.segments_BT), self._rows.plan.num_targets(numbers)
        return WorkerBatch(inputs_BT, targets_BT, segments_BT, int(num_targets.sum()), "")

    def _timed(self, work: Callable[[], object]) -> float:
        runtime.synchronize(self._device)
        started_s = time.perf_counter()
        work()
        runtime.synchronize(self._device)
        return time.perf_counter() - started_s


def _evaluation_s(task: TrainTask, rows: Rows, step_s: float, steps_left: int) -> float:
    """Evaluations cost a third of a training step for as many tokens: the forward pass alone."""
    num_tokens = rows.corpus.num_tokens("val")
    if task.train.eval_tokens is not None:
        num_tokens = min(num_tokens, task.train.eval_tokens)
    times = steps_left // task.train.eval_every_steps if task.train.eval_every_steps else min(1, steps_left)
    return times * num_tokens / task.batch_tokens * step_s / 3


def _memory(held: _Bytes, trial: _Trial, device: torch.device) -> dict[str, int]:
    """Bytes of one worker where its model is. A checkpoint is copied to the CPU's memory while it is written.

    On a CPU `program` is what the trial needed beside what is counted: Python, torch, and what torch works in.
    """
    parts = {
        "weights": held.weights,
        "gradients": held.gradients,
        "optimizer": held.optimizer,
        "average": held.average,
        "activations": held.activations_per_row * trial.micro_batch_rows,
    }
    if device.type == "cpu":
        tried = (*list(parts.values())[:3], held.activations_per_row * trial.rows_at_once) if trial.rows_at_once else ()
        parts["program"] = max(runtime.rss_bytes(), runtime.peak_rss_bytes() - sum(tried))
        parts["checkpoint_copy"] = held.checkpoint
    sizes = {"activations_per_row": held.activations_per_row, "total": sum(parts.values())}
    return {**parts, **sizes, "free": _free_bytes(device)}


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _disk(task: TrainTask, checkpoint_bytes: int) -> dict[str, int]:
    """Bytes of checkpoints: those that are kept, and the one being written before the oldest goes."""
    place = next(folder for folder in (task.folder, *task.folder.parents) if folder.is_dir())
    kept = task.train.keep_last + task.train.keep_best
    held = sum(f.stat().st_size for step in store.whole_steps(task.folder) for f in step.iterdir())
    return {
        "checkpoint": checkpoint_bytes,
        "kept": kept,
        "total": checkpoint_bytes * (kept + 1) + SPARE_BYTES,
        "free": shutil.disk_usage(place).free + held,
    }


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} with {runtime.num_cpus()} cores"


def _why(task: TrainTask, compiled: bool, device: torch.device) -> str:
    if not runtime.can_compile(device):
        return "a compiler or Python's headers are missing" + (", or Triton" if device.type == "cuda" else "")
    if task.train.compile is not None:
        return "as the recipe says"
    return "the run is long enough to pay for it" if compiled else "the run is too short to pay for it"


def _remarks(found: dict[str, Any]) -> Iterator[str]:
    """What a person should think of before starting this."""
    if found["steps_done"] == found["steps"]:
        yield "the run is finished: training answers at once"
    elif found["steps_done"]:
        yield f"the run goes on from step {found['steps_done']:,}"
    per_parameter, epochs = found["tokens_per_parameter"], found["epochs"]
    if per_parameter < OPTIMAL_TOKENS / 2:
        yield f"few tokens for this model: about {OPTIMAL_TOKENS} per parameter give the least loss for the work done"
    elif per_parameter > OPTIMAL_TOKENS * 2:
        yield f"many tokens for this model: beyond {OPTIMAL_TOKENS} per parameter a larger one would learn more"
    if epochs > MANY_EPOCHS:
        yield f"the corpus is read {epochs:.1f} times: from {MANY_EPOCHS} on, repeated text teaches little that is new"
    if found["memory"]["total"] > found["memory"]["free"]:
        yield "memory is short: a smaller train.micro_batch_rows, or train.checkpoint_activations: true"
    if found["disk"]["total"] > found["disk"]["free"]:
        yield "the disk is too small for the checkpoints: a smaller train.keep_last"
    if found["workers"] > (cores := runtime.num_cpus()) and "cuda" not in found["device"]:
        yield f"{found['workers']} workers need as many CPUs, and this machine has {cores}: a cluster must have more"
    if not found["measured"]:
        yield f"the model is too large to be tried here: the time assumes {USUAL_MFU:.0%} of the machine's peak"
