"""A training task with other values: `from tests.changed_task import changed`."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from pipelines.train.task import TrainTask
from ulm.recipes.train import Train, TrainRecipe


def changed(whole: TrainTask, name: str, **values: Any) -> TrainTask:
    """The task as run `name` beside its own folder, with values laid over it, its recipe, or its recipe's `train`."""
    own = {field.name for field in fields(TrainTask)}
    of_train = {key: value for key, value in values.items() if key in Train.model_fields and key not in own}
    of_recipe = {key: v for key, v in values.items() if key in TrainRecipe.model_fields and key not in own}
    train = whole.train.model_copy(update=of_train)
    recipe = whole.recipe.model_copy(update={"train": train, **of_recipe})
    of_task = {key: value for key, value in values.items() if key not in of_train and key not in of_recipe}
    return replace(whole, **{"run": name, "folder": whole.folder.with_name(name), "recipe": recipe, **of_task})
