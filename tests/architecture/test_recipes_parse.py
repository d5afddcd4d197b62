"""Every recipe of the repository is accepted by the loader, under the verb that its place and name say."""

from __future__ import annotations

from pathlib import Path

import pytest

from ulm.errors import ConfigError
from ulm.recipes import RECIPES, load_recipe

ROOT = Path(__file__).parents[2]
FILES = sorted((*ROOT.glob("pipelines/recipes/**/*.yaml"), *ROOT.glob("serve/recipes/**/*.yaml")))
VERBS = {"corpus": "corpus build", "tokenizer": "tokenizer train", "train": "train", "swarm": "swarm train"}


def verb(path: Path) -> str:
    """The verb of a recipe: `serve up` in serve/, in pipelines/ by the word that its name begins with."""
    return "serve up" if path.is_relative_to(ROOT / "serve") else VERBS[path.stem.partition("-")[0]]


def test_each_package_has_recipes() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == {"pipelines", "serve"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_recipe_of_the_repository_parses(path: Path) -> None:
    assert type(load_recipe(verb(path), path)) is RECIPES[verb(path)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_field_that_no_recipe_has_is_refused(path: Path, tmp_path: Path) -> None:
    broken = tmp_path / path.name
    broken.write_text(path.read_text(encoding="utf-8") + "\nno_such_field: 1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="no_such_field"):
        load_recipe(verb(path), broken)
