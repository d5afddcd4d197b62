"""Training by several processes without Ray: `from tests.process_group import train_by`."""

from __future__ import annotations

import itertools
import multiprocessing
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.train.task import TrainTask

TIMEOUT_S = 120.0
PRELOADED = ["pipelines.train.loop", "torch._dynamo", "torch.utils.tensorboard"]  # 5 s, else of every process


def train_by(task: TrainTask, workers: int, *, steps: int | None = None) -> list[list[dict[str, np.ndarray]]]:
    """Train with `workers` processes, to the end or `steps` steps further; {inputs_BT, targets_BT} by rank and step.

    The processes are forked from one that has imported torch and nothing else has run in.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        ranks = [
            context.Process(target=_worker, args=(place, task, rank, workers, steps), daemon=True)
            for rank in range(workers)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(TIMEOUT_S)
        codes = [process.exitcode for process in ranks]
        for process in ranks:
            if process.is_alive():
                process.kill()
        assert codes == [0] * workers, f"exit codes of the ranks: {codes}"
        taken = [np.load(place / f"{rank}.npz") for rank in range(workers)]
        return [
            [{"inputs_BT": a, "targets_BT": b} for a, b in zip(of["inputs"], of["targets"], strict=True)]
            for of in taken
        ]


def _worker(place: Path, task: TrainTask, rank: int, world_size: int, steps: int | None) -> None:
    import torch
    import torch.distributed as dist

    from pipelines.train.feed import Feed, WorkerBatch
    from pipelines.train.loop import train
    from ulm import runtime

    runtime.peak_flops = lambda *_: 1e12  # measuring it would take a second of each start
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{place / 'meeting'}", rank=rank, world_size=world_size)
    taken: list[WorkerBatch] = []
    take = Feed.next

    def kept(feed: Feed) -> WorkerBatch:
        taken.append(take(feed))
        return taken[-1]

    Feed.next = kept  # type: ignore[method-assign]
    calls = itertools.count()  # asked once before the first step, and once in each
    stop: dict[str, Any] = {} if steps is None else {"should_stop": lambda: next(calls) >= steps}
    train(task, rank=rank, world_size=world_size, device=torch.device("cpu"), **stop)
    both = {
        "inputs": np.array([b.inputs_BT.numpy() for b in taken]),
        "targets": np.array([b.targets_BT.numpy() for b in taken]),
    }
    np.savez(place / f"{rank}.npz", **both)
    if world_size > 1:
        dist.destroy_process_group()
