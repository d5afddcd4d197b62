"""`ulm train`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from importlib import util
from typing import Annotated, Any, cast

import typer

from ulm import runtime
from ulm.cli import console, train_tables
from ulm.cli.cluster import session
from ulm.cli.options import Address, Overrides, Recipe
from ulm.errors import ConfigError
from ulm.recipes import TrainRecipe, load_recipe

Plan = Annotated[bool, typer.Option("--plan", help="Estimate memory, time and disk, and train nothing.")]
NoRay = Annotated[bool, typer.Option("--no-ray", help="Train in this process. Default where Ray is not installed.")]


def add_to(app: typer.Typer) -> None:
    """Hang this file's verbs on the command line."""
    app.command("train")(train)


def train(
    recipe: Recipe,
    overrides: Overrides = [],  # noqa: B006  typer copies it
    address: Address = None,
    estimate: Plan = False,
    no_ray: NoRay = False,
) -> None:
    """Train a model on a corpus. Running it again resumes; a finished run answers at once.

    Example: ulm train train.yaml --set train.steps=200 --set train.workers=2
    """
    loaded = cast(TrainRecipe, load_recipe("train", recipe, overrides))
    root = runtime.root()
    if estimate:
        from pipelines.train.plan import plan

        if no_ray:
            from pipelines.train.alone import alone

            loaded = alone(loaded)
        planned = plan(loaded, root=root, near=recipe.parent)
        console.err.print(train_tables.plan(planned))
        console.finish(planned)
        return
    from pipelines.train import folder
    from pipelines.train.prepare import prepare

    no_ray = no_ray or util.find_spec("ray") is None
    if no_ray and address is not None:
        raise ConfigError("--address", "training without Ray joins no cluster", "install Ray and leave --no-ray out")
    task = prepare(loaded, root=root, near=recipe.parent)  # what is wrong is said before Ray starts
    if folder.is_finished(task):
        console.err.print(train_tables.finished(loaded.name))
    run: Callable[..., dict[str, Any]]
    with ExitStack() as stack:
        if no_ray:
            from pipelines.train.alone import run
        else:
            from pipelines.train.job import run

            stack.enter_context(session(root, address))
        bars = stack.enter_context(console.bars())
        result = run(
            loaded,
            root=root,
            task=task,
            on_progress=lambda step, num_steps, figures: bars.step(loaded.name, step, num_steps, figures),
            on_event=bars.event,
        )
    console.err.print(train_tables.ending(result, root / "runs" / loaded.name / "report.html"), soft_wrap=True)
    console.finish_job(result)
