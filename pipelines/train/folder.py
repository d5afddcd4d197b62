"""What a run's folder says of the run: whose it is, how far it came, how it ended."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from pipelines.train import figures
from pipelines.train.task import TrainTask
from ulm import artefacts
from ulm.checkpoints import store
from ulm.errors import ConfigError
from ulm.recipes.train import TrainingRecipe

TASK = "task.json"  # the identity of the task that the folder belongs to
WARM_UP_STEPS = 20  # left out of a run's tokens per second


def check(task: TrainTask) -> None:
    """ConfigError when the folder belongs to another task; running a recipe again resumes only the same one.

    Where the checkpoint to begin with is still to be trained, its digest is not compared; `claim` will.
    """
    path = task.folder / TASK
    if not path.is_file():
        return
    held, now = json.loads(path.read_text(encoding="utf-8")), task.identity()
    if task.init_from and not task.init_from.is_dir():
        now["init_from"] = held["init_from"]
    if differ := sorted(_differences(held, now)):
        remedy = f"give this recipe another name, or remove {task.folder}"
        raise ConfigError("name", f"run {task.run!r} exists with another {', '.join(differ)}", remedy)


def claim(task: TrainTask) -> None:
    """Make the folder this task's, or refuse it as `check` does."""
    check(task)
    if not (task.folder / TASK).is_file():
        artefacts.write_json(task.folder / TASK, task.identity())


def write_recipe(task: TrainTask, recipe: TrainingRecipe) -> None:
    """The recipe that the run came from, with the corpus by its digest, unless it is there already."""
    if not (task.folder / "recipe.yaml").is_file():
        fields = {**recipe.model_dump(mode="json", exclude_unset=True), "corpus": task.corpus.name}
        artefacts.write_text(task.folder / "recipe.yaml", yaml.safe_dump(fields, sort_keys=False))


def newest_step(task: TrainTask) -> tuple[Path | None, int]:
    """The newest whole checkpoint and its step; (None, 0) before there is one."""
    newest = store.newest(task.folder)
    return newest, int(newest.name.removeprefix("step-")) if newest else 0


def is_finished(task: TrainTask) -> bool:
    """Whether the task's last step has been saved."""
    return newest_step(task)[1] >= task.num_steps


def last_line(task: TrainTask) -> dict[str, Any]:
    """Where a run stands, as `ulm train` ends: with `status: interrupted` when it has not reached its end."""
    checkpoint, step = newest_step(task)
    line = {"run": task.run, "checkpoint": str(checkpoint) if checkpoint else None, "step": step}
    if step < task.num_steps:
        return {"status": "interrupted", **line}
    lines = list(figures.read(task.folder))
    last = lines[-1] if lines else {}
    ends = {"loss": last.get("loss"), "bits_per_byte": last.get("bits_per_byte")}
    return {**line, **ends, "tokens_per_second": _tokens_per_second(lines)}


def _tokens_per_second(lines: list[dict[str, Any]]) -> float | None:
    timed = lines[min(WARM_UP_STEPS, len(lines) // 2) :]
    seconds = sum(line["step_tokens"] / line["tokens_per_second"] for line in timed)
    return sum(line["step_tokens"] for line in timed) / seconds if seconds else None


def _differences(a: Any, b: Any, place: str = "") -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in a.keys() | b.keys():
            yield from _differences(a.get(key), b.get(key), f"{place}.{key}" if place else key)
    elif a != b:
        yield f"{place} ({a!r}, now {b!r})"
