"""Runs that take a fifth of a second, and ways to disturb them: `from tests.tiny_run import …`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipelines.train import events
from pipelines.train.figures import StepFigures, read
from pipelines.train.run import Run
from pipelines.train.task import TrainTask, resolve
from tests.written_corpus import written_corpus
from ulm.checkpoints.manifest import read_manifest
from ulm.recipes.base import validate
from ulm.recipes.train import TrainRecipe

WORDS = "the small model learns what a text is made of and then says how likely the next word will be".split()
TEXTS = [" ".join(WORDS[(i * k + k) % len(WORDS)] for k in range(12)) + f". {i}\n" for i in range(60)]
MODEL = {
    "preset": "nano",
    "num_layers": 1,
    "d_model": 32,
    "attention": {"kind": "gqa", "num_heads": 1, "num_kv_heads": 1},
    "feedforward": {"kind": "swiglu", "d_hidden": 64},
}
TRAIN = {"steps": 8, "batch_tokens": 128, "context_tokens": 32, "precision": "float32", "eval_tokens": 500}
SAME = ("step", "loss", "tokens", "batch_digest", "lr", "grad_norm", "val_loss", "bits_per_byte")


def tiny_tasks(root: Path) -> Callable[..., TrainTask]:
    """Makes tasks on a corpus of 50 short texts: a name, fields of a recipe, and fields of its `train` section."""
    written_corpus(root, {"train": TEXTS[10:], "val": TEXTS[:10], "test": []})

    def make(name: str = "a", *, train: dict[str, Any] | None = None, **fields: Any) -> TrainTask:
        fields = {"corpus": "written", "model": MODEL, "samples": {"prompts": ()}, **fields}
        return resolve(validate(TrainRecipe, {"name": name, **fields, "train": {**TRAIN, **(train or {})}}), root=root)

    return make


def lines(task: TrainTask, *keys: str) -> list[tuple[Any, ...]]:
    """Values of these keys in each line of a run's metrics."""
    return [tuple(line.get(key) for key in keys) for line in read(task.folder)]


def said(task: TrainTask, kind: str) -> list[tuple[int, str]]:
    """Step and text of a run's events of one kind."""
    return [(event.step, event.text) for event in events.read(task.folder) if event.kind == kind]


def digests(checkpoint: Path) -> tuple[str, str]:
    """Of the weights and of the optimizer's state in a checkpoint."""
    files = read_manifest(checkpoint).files
    return files["model.safetensors"], files["optimizer.safetensors"]


def stop_after(steps: int) -> Callable[[], bool]:
    """`should_stop` for a run that is to make so many steps from where it stands."""
    asked = itertools.count()  # once before the first step, then in each
    return lambda: next(asked) >= steps


@contextmanager
def opened_runs() -> Iterator[list[Run]]:
    """The runs that are opened in the block, so that a test can get at their models."""
    found: list[Run] = []
    real = Run.open

    def opened(*how: Any) -> Run:
        found.append(real(*how))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "open", opened)
        yield found


def scaled(runs: list[Run], at: int, factor: float, *, while_lr_scale_above: float = 0.0) -> Callable[..., None]:
    """`on_step` that multiplies the last norm's weight after step `at`, once; or each time, down to that rate."""
    times = itertools.count()

    def spoil(figures: StepFigures) -> None:
        run = runs[-1]
        if figures.step == at and (not next(times) or 0 < while_lr_scale_above < run.rollbacks.lr_scale):
            run.model.norm.weight.data.mul_(factor)

    return spoil
