"""Eight experts trained by a queue of workers: how long it takes, how much of their time they idle, what kills cost."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray

from pipelines.swarm.workers_job import train_all
from pipelines.train import folder
from pipelines.train.figures import read
from pipelines.train.task import TrainTask, resolve
from tests.changed_task import changed
from tests.processes import training_workers
from tests.written_corpus import stdlib_docstrings, written_corpus
from ulm import runtime
from ulm.corpus.manifest import Corpus
from ulm.corpus.order import Order, batch_digest
from ulm.corpus.rows import RowPlan
from ulm.recipes.base import validate
from ulm.recipes.train import SwarmResources, TrainRecipe

EXPERTS = 8
STEPS, BATCH_TOKENS, CONTEXT_TOKENS = 300, 2_048, 256  # of an expert: about 20 s on one core
SAVE_EVERY_STEPS = 40
MODEL = {  # of the first trial: 0.36M parameters, at a vocabulary of 4,096
    "preset": "llama-like", "size": "nano", "d_model": 64, "num_layers": 2, "context_tokens": CONTEXT_TOKENS,
    "attention": {"num_heads": 2, "num_kv_heads": 2}, "feedforward": {"kind": "relu2", "d_hidden": 256},
}  # fmt: skip


def run(home: Path, slots: int, kill_every_s: float | None = None, *, steps: int = STEPS) -> dict[str, Any]:
    """Train eight experts on a Ray of so many slots of one thread, in a folder of `home` that is made anew.

    A worker is killed after half of `kill_every_s` and every `kill_every_s` from then on. Returns {"seconds", from the
    first worker's start on, "slots", "idle_share", "workers", "kills", "finished": experts, "exact_order": whether all
    batches of all of them were those of the keyed order, each once}.
    """
    place = home / f"{slots}-slots{'' if kill_every_s is None else '-killed'}"
    shutil.rmtree(place, ignore_errors=True)
    tasks = _tasks(place, steps)
    began_s, kills = time.monotonic(), 0

    def kill(run: str, step: int, num_steps: int, figures: dict[str, Any]) -> None:
        nonlocal kills
        if kill_every_s is None or time.monotonic() - began_s < kill_every_s * (kills + 0.5):
            return
        if workers := training_workers(b"ray::ExpertWorker.train"):
            os.kill(workers[kills % len(workers)], signal.SIGKILL)
            kills += 1

    runtime.spare_cores()
    ray.init(address="local", num_cpus=slots, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    try:
        began_s = time.monotonic()
        found = train_all(tasks, name="queue", resources=SwarmResources(cpus_per_worker=1), on_progress=kill)
    finally:
        ray.shutdown()
    return {
        "seconds": found["wall_s"],
        "slots": slots,
        "idle_share": found["idle_share"],
        "workers": found["workers"],
        "kills": kills,
        "finished": sum(folder.is_finished(task) for task in tasks),
        "exact_order": all(_is_exact(task) for task in tasks),
    }


def _tasks(place: Path, steps: int) -> list[TrainTask]:
    texts = [text for text in stdlib_docstrings(400) if len(text) > 200]
    train = list(itertools.islice(itertools.cycle(texts), 4_000))
    corpus = written_corpus(place, {"train": train, "val": texts[:20]})
    fields = {"steps": steps, "batch_tokens": BATCH_TOKENS, "context_tokens": CONTEXT_TOKENS, "compile": False}
    fields |= {"checkpoint_every_steps": SAVE_EVERY_STEPS, "eval_tokens": 5_000}
    recipe = {"name": "e", "corpus": "written", "model": MODEL, "train": fields, "samples": {"prompts": []}}
    whole = resolve(validate(TrainRecipe, recipe), root=place)
    tasks = []
    for expert in range(EXPERTS):
        documents = place / f"documents-{expert}.npy"
        np.save(documents, np.arange(expert, corpus.documents.num_rows, EXPERTS))
        tasks.append(changed(whole, f"e{expert:02d}", documents=documents))
    return tasks


def _is_exact(task: TrainTask) -> bool:
    """Whether the run's metrics have every step once, each on the rows that are its in the keyed order."""
    plan = RowPlan.make(
        Corpus.read(task.corpus), "train", context_tokens=CONTEXT_TOKENS, documents=task.chosen_documents()
    )
    order, rows = Order(plan.classes, seed=task.train.seed), task.rows_per_batch
    expected = [(step + 1, batch_digest(order.rows(step * rows, rows))) for step in range(task.num_steps)]
    return [(line["step"], line["batch_digest"]) for line in read(task.folder)] == expected
