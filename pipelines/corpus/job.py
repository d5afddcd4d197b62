"""`ulm corpus build` and `ulm corpus extend` on Ray Data: assemble.py's steps, their parts side by side on all workers.

Each step is one streaming Ray Data pipeline, named in Ray's dashboard by its task: read_and_clean,
find_near_duplicates, tokenize_documents.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data

from pipelines import job as submitted
from pipelines.corpus import assemble
from pipelines.corpus.over import Item, Over, Progress, Task
from pipelines.corpus.tokens import SHARD_BYTES
from ulm.recipes.corpus import CorpusRecipe, ExtendRecipe

MAX_ITEMS = 16  # in one task: what is done again where its worker is lost


def build(
    recipe: CorpusRecipe | ExtendRecipe,
    *,
    root: Path,
    near: Path | None = None,
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Build a corpus on the Ray cluster that this process has joined; returns the last line of `ulm corpus build`.

    Raises what `assemble.build` does.
    """
    over = over_ray(recipe.workers)
    corpus = assemble.build(recipe, root=root, near=near, over=over, progress=progress, shard_bytes=shard_bytes)
    manifest = corpus.manifest
    return {
        "corpus": str(corpus.folder),
        "digest": corpus.digest,
        "documents": manifest["documents"],
        "tokens": manifest["tokens"],
    }


def over_ray(workers: int | None) -> Over:
    """An `Over` on Ray Data with so many tasks at a time; None: as many as the cluster has CPUs."""
    num_tasks = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))

    def over(task: Task, items: Sequence[Item]) -> Iterator[Item]:
        if not items:
            return

        def run(batch: pa.Table) -> Iterator[pa.Table]:
            for item in json.loads(batch["items"][0].as_py()):
                yield pa.table({"result": pa.array([json.dumps(task(item))], pa.string())})

        run.__name__ = run.__qualname__ = task.__name__  # what the dashboard shows
        with quiet_data():
            rows = [{"items": json.dumps(some)} for some in _guided(items, num_tasks)]
            data = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
                run,
                batch_size=None,
                batch_format="pyarrow",
                compute=ray.data.TaskPoolStrategy(size=min(num_tasks, len(rows))),  # it warns of more tasks than blocks
            )
            for batch in data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                yield from map(json.loads, batch["result"].to_pylist())

    return over


def _guided(items: Sequence[Item], num_tasks: int) -> Iterator[Sequence[Item]]:
    """Items in runs that become shorter: Ray Data takes a tenth of a second to hand a worker its next task.

    Guided self-scheduling (Polychronopoulos and Kuck, 1987), with half of an even share at a time.
    """
    at = 0
    while at < len(items):
        size = min(MAX_ITEMS, -(-(len(items) - at) // (2 * num_tasks)))
        yield items[at : at + size]
        at += size


@contextmanager
def quiet_data() -> Iterator[None]:
    """Ray Data without bars and notes of its own; its settings come back afterwards."""
    context = ray.data.DataContext.get_current()
    noisy = logging.getLogger("ray.data")
    settings = "enable_progress_bars", "op_resource_reservation_enabled", "target_max_block_size"
    before, level = [getattr(context, name) for name in settings], noisy.level
    context.enable_progress_bars = False
    # Ray 2.60 holds resources back for later operators, of which there are none: the second worker began a second late.
    context.op_resource_reservation_enabled = False
    context.target_max_block_size = 1  # each result goes out at once, so that progress is told
    noisy.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, value in zip(settings, before, strict=True):
            setattr(context, name, value)
        noisy.setLevel(level)


def main(argv: list[str] | None = None) -> int:
    """`python -m pipelines.corpus.job RECIPE [--set a.b=c]`: the exit code; as a Ray job it joins the job's cluster."""
    return submitted.run("corpus build", build, argv)


if __name__ == "__main__":
    sys.exit(main())
