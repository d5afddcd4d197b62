"""The recipe types of all jobs, by verb, and their loader."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ulm.recipes.base import Recipe, load
from ulm.recipes.corpus import CorpusRecipe, ExtendRecipe, TokenizerRecipe
from ulm.recipes.serve import ServeRecipe
from ulm.recipes.train import SwarmAddRecipe, SwarmRecipe, TrainRecipe

__all__ = [
    "RECIPES", "CorpusRecipe", "ExtendRecipe", "ServeRecipe", "SwarmAddRecipe", "SwarmRecipe", "TokenizerRecipe",
    "TrainRecipe", "load_recipe",
]  # fmt: skip

RECIPES: dict[str, type[Recipe]] = {
    "corpus build": CorpusRecipe,
    "corpus extend": ExtendRecipe,
    "tokenizer train": TokenizerRecipe,
    "train": TrainRecipe,
    "swarm train": SwarmRecipe,
    "swarm add": SwarmAddRecipe,
    "serve up": ServeRecipe,
}


def load_recipe(verb: str, path: Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a verb."""
    return load(RECIPES[verb], path, overrides)
