"""What runs on each training worker: the loop, given its rank, its threads, its device and its metrics by Ray."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ray.train
import torch
import torch.distributed as dist
from ray.train import Checkpoint, CheckpointUploadMode
from ray.train.torch import get_device
from ray.util.metrics import Counter, Gauge

from pipelines.train.figures import StepFigures
from pipelines.train.loop import Result, train
from pipelines.train.task import Stage, TrainTask
from ulm import runtime
from ulm.metrics import METRICS

STOP = "stop"  # a file in the run's folder: save and return after the step under way
GAUGES = (
    "ulm_train_tokens_per_second",
    "ulm_train_loss",
    "ulm_train_bits_per_byte",
    "ulm_memory_resident_bytes",
    "ulm_memory_gpu_bytes",
)


@dataclass(frozen=True)
class Work:
    """What all workers of one trainer are given. Ray sets OMP_NUM_THREADS by the CPUs; torch's threads are set here."""

    stages: tuple[Stage, ...]
    threads: int
    report: bool  # checkpoints are within Ray's folder of the run, so Ray may be told of them


def train_worker(config: dict[str, Work]) -> None:
    """Ray Train's function on every worker: the stages in order, until one is asked to stop."""
    work = config["work"]
    torch.set_num_threads(work.threads)
    logging.getLogger("pipelines").setLevel(logging.INFO)
    context, device, export = ray.train.get_context(), get_device(), _exporter()
    rank, world_size = context.get_world_rank(), context.get_world_size()

    def run(task: TrainTask, rank: int, world_size: int) -> Result:
        return train(
            task,
            rank=rank,
            world_size=world_size,
            device=device,
            on_step=lambda figures: export(task, figures),
            on_checkpoint=_report if work.report else lambda place: None,
            should_stop=(task.folder / STOP).exists,
        )

    for number, stage in enumerate(work.stages):
        stopped = False
        for task in stage.of_worker(rank, world_size) if stage.side_by_side else stage.tasks:
            alone = stage.side_by_side
            stopped = stopped or run(task, 0 if alone else rank, 1 if alone else world_size).stopped
        if number + 1 < len(work.stages) and _anywhere(stopped, device):
            return


def _anywhere(mine: bool, device: torch.device) -> bool:
    """Whether it is true on any worker; all have finished the stage when this returns."""
    flag = torch.tensor(float(mine), device=device)
    if dist.is_initialized():
        dist.all_reduce(flag)
    return bool(flag)


def _report(place: Path) -> None:
    # Ray must not copy: its file-by-file upload would break the atomic rename. It only learns where it is.
    ray.train.report({}, Checkpoint(str(place)), checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD)


def _exporter() -> Callable[[TrainTask, StepFigures], None]:
    """Sets the training metrics after each step."""
    declared = METRICS["ulm_train_tokens_total"]
    counter = Counter(declared.name.removesuffix("_total"), description=declared.help, tag_keys=declared.tags)
    gauges = {name: Gauge(name, description=METRICS[name].help, tag_keys=METRICS[name].tags) for name in GAUGES}

    def export(task: TrainTask, figures: StepFigures) -> None:
        tags = {"run": task.run, "model": f"{task.spec.d_model}x{task.spec.num_layers}"}
        counter.inc(figures.step_tokens, tags)
        gauges["ulm_train_tokens_per_second"].set(figures.tokens_per_second, tags)
        gauges["ulm_train_loss"].set(figures.loss, tags)
        if figures.bits_per_byte is not None:
            gauges["ulm_train_bits_per_byte"].set(figures.bits_per_byte, tags)
        gauges["ulm_memory_resident_bytes"].set(runtime.rss_bytes(), {"role": "trainer"})
        gauges["ulm_memory_gpu_bytes"].set(runtime.gpu_bytes(), {"role": "trainer"})

    return export
