"""What runs on each training worker: the loop, given its rank, its threads, its device and its metrics by Ray."""

from __future__ import annotations

import logging
import time
from collections import Counter as Tally
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train import Checkpoint, CheckpointUploadMode
from ray.train.torch import get_device
from ray.util.metrics import Counter, Gauge

from pipelines.train import events
from pipelines.train.figures import StepFigures
from pipelines.train.loop import train
from pipelines.train.stopping import STOP
from pipelines.train.task import TrainTask
from ulm import runtime
from ulm.metrics import METRICS

# By metric, what of StepFigures it shows.
GAUGES = {
    "ulm_train_tokens_per_second": "tokens_per_second",
    "ulm_train_loss": "loss",
    "ulm_train_val_loss": "val_loss",
    "ulm_train_bits_per_byte": "bits_per_byte",
    "ulm_train_step": "step",
    "ulm_train_mfu": "mfu",
    "ulm_train_learning_rate": "lr",
    "ulm_train_grad_norm": "grad_norm",
}
COUNTERS = ("ulm_train_tokens_total", "ulm_train_data_wait_seconds_total", "ulm_train_events_total")
MEMORY = ("ulm_memory_resident_bytes", "ulm_memory_gpu_bytes")
EXPORT_EVERY_S = 1.0  # setting them takes 0.2 ms, and a step may take ten; Prometheus asks every few seconds


@dataclass(frozen=True)
class Work:
    """What all workers of one trainer are given. Ray sets OMP_NUM_THREADS by the CPUs; torch's threads are set here."""

    task: TrainTask
    threads: int


def train_worker(config: dict[str, Work]) -> None:
    """Ray Train's function on every worker: the task to its end, or until it is asked to stop."""
    work = config["work"]
    torch.set_num_threads(work.threads)
    logging.getLogger("pipelines").setLevel(logging.INFO)
    context = ray.train.get_context()
    with Exporter().of(work.task) as on_step:
        train(
            work.task,
            rank=context.get_world_rank(),
            world_size=context.get_world_size(),
            device=get_device(),
            on_step=on_step,
            on_checkpoint=_report,
            should_stop=(work.task.folder / STOP).exists,
        )


def _report(place: Path) -> None:
    # Ray must not copy: its file-by-file upload would break the atomic rename. It only learns where it is.
    ray.train.report({}, Checkpoint(str(place)), checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD)


class Exporter:
    """The training metrics, as Ray exports them."""

    def __init__(self) -> None:
        self._gauges = {name: declared(Gauge, name) for name in (*GAUGES, *MEMORY)}
        self._tokens, self._data_wait_s, self._events = (declared(Counter, name) for name in COUNTERS)

    @contextmanager
    def of(self, task: TrainTask) -> Iterator[Callable[[StepFigures], None]]:
        """What to call after each step of a task. About once a second, and at the end, the metrics are set."""
        tags = {"run": task.run, "model": f"{task.spec.d_model}x{task.spec.num_layers}"}
        latest: dict[str, float] = {}
        tokens, data_wait_s, exported_s = 0, 0.0, 0.0
        told: Tally[str] = Tally()

        def see(figures: StepFigures) -> None:
            nonlocal tokens, data_wait_s
            tokens, data_wait_s = tokens + figures.step_tokens, data_wait_s + figures.data_wait_s
            for name, field in GAUGES.items():
                if (value := getattr(figures, field)) is not None:
                    latest[name] = value
            if time.monotonic() - exported_s > EXPORT_EVERY_S:
                export()

        def export() -> None:
            nonlocal tokens, data_wait_s, exported_s, told
            for name, value in latest.items():
                self._gauges[name].set(value, tags)
            for name, num_bytes in zip(MEMORY, (runtime.rss_bytes(), runtime.gpu_bytes()), strict=True):
                self._gauges[name].set(num_bytes, {"role": "trainer"})
            if tokens:  # Ray's counters refuse to be moved by nothing
                self._tokens.inc(tokens, tags)
            if data_wait_s > 0:
                self._data_wait_s.inc(data_wait_s, tags)
            happened = Tally(event.kind for event in events.read(task.folder))
            for kind, number in (happened - told).items():
                self._events.inc(number, {**tags, "kind": kind})
            tokens, data_wait_s, exported_s, told = 0, 0.0, time.monotonic(), happened

        try:
            yield see
        finally:
            if latest:
                export()


def declared(kind: Any, name: str) -> Any:
    """A metric of the project's table, as this kind of Ray's."""
    metric = METRICS[name]
    return kind(name.removesuffix("_total"), description=metric.help, tag_keys=metric.tags)
