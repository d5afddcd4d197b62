"""The peer of `ulm train`: the shortest loop over the same model, rows and batch in one process; prints tokens/s.

It does the same updates (the project's chunked loss, AdamW, clipping) and leaves out what a run needs and a loop does
not: exact resume, digests, evaluation, checkpoints, metrics, Ray.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

import ulm
from pipelines.train.task import resolve
from ulm import registry, runtime
from ulm.components.loss import summed_nats
from ulm.corpus.manifest import Corpus
from ulm.corpus.rows import RowPlan
from ulm.recipes import TrainRecipe
from ulm.recipes.base import load


def main(recipe: Path, warmup_steps: int) -> None:
    """Run the recipe's steps and print the tokens per second of those after the warm-up."""
    torch.set_num_threads(runtime.num_cpus())
    task = resolve(load(TrainRecipe, recipe), root=runtime.root())
    plan = RowPlan.make(
        Corpus.read(task.corpus), "train", context_tokens=task.spec.context_tokens, seed=task.train.seed
    )
    model = ulm.build(task.spec, seed=task.train.seed)
    optimizer = registry.find("optimizer", "adamw").build(task.optimizer, model, task.optimizer.lr)
    order = torch.randperm(plan.num_rows, generator=torch.Generator().manual_seed(0)).numpy()
    tokens, started_s = 0, 0.0
    for step in range(task.num_steps):
        if step == warmup_steps:
            tokens, started_s = 0, time.perf_counter()
        rows = [order[(step * task.rows_per_batch + i) % plan.num_rows] for i in range(task.rows_per_batch)]
        batch = plan.batch(torch.tensor(rows).numpy())
        targets_BT = torch.from_numpy(batch.targets_BT)
        num_targets = int((targets_BT >= 0).sum())
        hidden_BTD = model.hidden(torch.from_numpy(batch.inputs_BT))
        (summed_nats(hidden_BTD, targets_BT, model.head, task.spec.vocab_size) / num_targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), task.train.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += num_targets
    sys.stdout.write(f"{tokens / (time.perf_counter() - started_s)}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
