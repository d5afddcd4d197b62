"""One run of a train recipe in a bare process, without Ray; prints what it was like as one JSON line.

`python _one_run.py RECIPE [--set a.b=value …] [--threads 2] [--warm-up-steps 20] [--held-out test]`; ULM_HOME says
where the corpus is. Several processes with --rank, --world-size and --rendezvous make the run together, over gloo.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.distributed as dist

from pipelines.train import validation
from pipelines.train.figures import read
from pipelines.train.loop import train
from pipelines.train.task import TrainTask, resolve
from ulm import runtime
from ulm.checkpoints import store
from ulm.corpus.manifest import Corpus
from ulm.corpus.rows import RowPlan
from ulm.models.account import num_parameters, on_meta, train_flops_per_token
from ulm.recipes import TrainRecipe, load_recipe


def main() -> None:
    """Train, then say how fast it was and how good."""
    options = argparse.ArgumentParser()
    options.add_argument("recipe", type=Path)
    options.add_argument("--set", action="append", default=[], dest="overrides")
    options.add_argument("--threads", type=int, default=None)
    options.add_argument("--warm-up-steps", type=int, default=0)
    options.add_argument("--held-out", default=None, help="a split to score the result on, whole")
    options.add_argument("--rank", type=int, default=0)
    options.add_argument("--world-size", type=int, default=1)
    options.add_argument("--rendezvous", default=None, help="file://PATH that the processes meet at")
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads or runtime.num_cpus())
    recipe = load_recipe("train", chosen.recipe, chosen.overrides)
    assert isinstance(recipe, TrainRecipe)
    task = resolve(recipe, root=runtime.root(), near=chosen.recipe.parent)
    with _group(chosen.rank, chosen.world_size, chosen.rendezvous):
        result = train(task, rank=chosen.rank, world_size=chosen.world_size)
    if chosen.rank == 0:
        assert result.checkpoint is not None
        line = speed(task, chosen.warm_up_steps) | quality(task)
        if chosen.held_out:
            line |= {chosen.held_out: held_out(task, result.checkpoint, chosen.held_out)}
        sys.stdout.write(json.dumps(line) + "\n")


@contextlib.contextmanager
def _group(rank: int, world_size: int, rendezvous: str | None) -> Iterator[None]:
    if world_size == 1:
        yield
        return
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    yield
    dist.destroy_process_group()


def pace(steps: Sequence[dict[str, Any]]) -> dict[str, float]:
    """How fast these steps of a metrics.jsonl were, and the share of their time that waited for data."""
    seconds = sum(step["step_tokens"] / step["tokens_per_second"] for step in steps)
    return {
        "tokens_per_second": sum(step["step_tokens"] for step in steps) / seconds,
        "seconds_per_step": seconds / len(steps),
        "data_wait_share": sum(step["data_wait_s"] for step in steps) / seconds,
    }


def speed(task: TrainTask, warm_up_steps: int) -> dict[str, float]:
    """The pace after the warm-up, seconds of all steps, and what a token costs."""
    steps, meta = list(read(task.folder)), on_meta(task.spec)
    return {
        **pace(steps[warm_up_steps:]),
        "seconds": pace(steps)["seconds_per_step"] * len(steps),
        "flops_per_token": train_flops_per_token(meta, task.spec.context_tokens),
        "parameters": num_parameters(meta),
    }


def quality(task: TrainTask) -> dict[str, Any]:
    """The last evaluation, where there was one."""
    lines = [line for line in read(task.folder) if "val_loss" in line]
    return {key: lines[-1].get(key) for key in ("val_loss", "bits_per_byte")} if lines else {}


def held_out(task: TrainTask, checkpoint: Path, split: str) -> dict[str, float | None]:
    """val_loss and bits_per_byte of the checkpoint on a whole split, in windows of the context that do not overlap."""
    model, tokenizer = store.load(checkpoint)
    corpus = Corpus.open(str(task.corpus), verify=False)
    plan = RowPlan.make(corpus, split, context_tokens=task.spec.context_tokens)
    texts = validation.HeldOut.of(plan, tokenizer, None)
    assert texts is not None, f"the corpus has no {split} split"
    return validation.figures(texts.score(model.eval(), next(model.parameters()).device, 0, 1))


if __name__ == "__main__":
    main()
