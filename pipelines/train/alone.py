"""Training in this process, without Ray."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pipelines.train import folder
from pipelines.train.events import Event, EventTail
from pipelines.train.figures import StepFigures
from pipelines.train.loop import train
from pipelines.train.prepare import prepare
from pipelines.train.saver import full_disk_told
from pipelines.train.stopping import STOP, stopping
from pipelines.train.task import TrainTask
from ulm import runtime
from ulm.errors import ConfigError
from ulm.recipes.train import TrainRecipe


def run(
    recipe: TrainRecipe,
    *,
    root: Path,
    near: Path | None = None,
    task: TrainTask | None = None,  # as `prepare` made it of the same recipe
    on_progress: Callable[[int, int, dict[str, Any]], None] | None = None,
    on_event: Callable[[str, Event], None] | None = None,
) -> dict[str, Any]:
    """Train what a recipe says, on all cores or the GPU of this process; files and last line are those of job.run.

    SIGTERM and Ctrl-C save and stop. ConfigError where the recipe allows no single worker.
    """
    recipe = alone(recipe)
    task = task or prepare(recipe, root=root, near=near)
    with full_disk_told(task.folder):
        folder.write_recipe(task, recipe)
        if not folder.is_finished(task):
            _train(task, on_progress, on_event)
        folder.name_model(task, root)
    return folder.last_line(task)


def alone(recipe: TrainRecipe) -> TrainRecipe:
    """The recipe for one worker; ConfigError where it wants more than the one that there is without Ray."""
    if 1 not in recipe.train.worker_counts:
        problem = f"at least {min(recipe.train.worker_counts)} workers are asked for, without Ray there is one"
        raise ConfigError("train.workers", problem, "1, or install Ray and leave --no-ray out")
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"workers": 1})})


def _train(
    task: TrainTask,
    on_progress: Callable[[int, int, dict[str, Any]], None] | None,
    on_event: Callable[[str, Event], None] | None,
) -> None:
    stop, tail = task.folder / STOP, EventTail(task.folder)

    def tell_events() -> None:
        for event in tail.new() if on_event else ():
            on_event(task.run, event)  # type: ignore[misc]

    def tell_step(figures: StepFigures) -> None:
        if on_progress is not None:
            on_progress(figures.step, task.num_steps, figures.as_json())
        tell_events()

    logging.getLogger("pipelines").setLevel(logging.INFO)
    with folder.held(task):  # no other process is at it, which this would disturb
        stop.unlink(missing_ok=True)  # asked of a driver that was killed before it could heed it
    try:
        with stopping([task.folder], on_event), all_cores():
            train(task, on_step=tell_step, should_stop=stop.exists)
    finally:
        tell_events()
        stop.unlink(missing_ok=True)


@contextmanager
def all_cores() -> Iterator[None]:
    """As many threads in the block as this process has cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(runtime.num_threads())
    try:
        yield
    finally:
        torch.set_num_threads(before)
