"""`ulm train`."""

from __future__ import annotations

from typing import cast

import typer

from ulm import runtime
from ulm.cli import console
from ulm.cli.cluster import session
from ulm.cli.options import Address, Overrides, Recipe
from ulm.recipes import TrainRecipe, load_recipe


def add_to(app: typer.Typer) -> None:
    """Hang this file's verbs on the command line."""
    app.command("train")(train)


def train(recipe: Recipe, overrides: Overrides = [], address: Address = None) -> None:  # noqa: B006  typer copies it
    """Train a model on a corpus. Running it again resumes; a finished run answers at once.

    Example: ulm train train.yaml --set train.steps=200 --set train.workers=2
    """
    loaded = cast(TrainRecipe, load_recipe("train", recipe, overrides))
    root = runtime.root()
    from pipelines.train import job

    task = job.prepare(loaded, root=root, near=recipe.parent)  # what is wrong is said before Ray starts
    with session(root, address), console.bars() as bars:
        result = job.run(
            loaded,
            root=root,
            task=task,
            on_progress=lambda step, num_steps, figures: bars.step(loaded.name, step, num_steps, figures),
        )
    console.finish_job(result)
