"""`ulm swarm add` on Ray: train one expert more, write the swarm anew with it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pipelines import job as submitted
from pipelines.swarm import change
from pipelines.train import job
from pipelines.train.events import Event
from pipelines.train.job import Progress
from ulm.recipes.train import SwarmAddRecipe


def add(
    recipe: SwarmAddRecipe,
    *,
    root: Path,
    near: Path | None = None,
    on_progress: Progress | None = None,
    on_event: Callable[[str, Event], None] | None = None,
) -> dict[str, Any]:
    """`change.add` with the training on this process's Ray cluster; returns and raises what that does."""
    run = partial(job.run, root=root, near=near, on_progress=on_progress, on_event=on_event)
    return change.add(recipe, root=root, run=run, near=near)


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m pipelines.swarm.add_job RECIPE [--set a.b=c]`: the exit code."""
    return submitted.run("swarm add", add, argv)


if __name__ == "__main__":
    sys.exit(main())
