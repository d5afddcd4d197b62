"""docs/endpoint.md is true: its tables are the bodies' fields and the application's paths, its recipe is one."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from serve.api.openai import build_app
from serve.api.responses import ResponsesBody
from serve.api.schema import Body, ChatBody, ChoicesBody, CompletionBody, GenerationBody
from tests.page import Page
from ulm.recipes.base import validate
from ulm.recipes.serve import Defaults, ServeRecipe

DOCS = Page.read("endpoint.md")
TABLES = [GenerationBody, ChoicesBody, CompletionBody, ChatBody, ResponsesBody]


def named(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def own(body: type[Body]) -> set[str]:
    """The fields that a body adds to those that it shares."""
    shared = [base for base in (GenerationBody, ChoicesBody) if base is not body and issubclass(body, base)]
    return set(body.model_fields) - {name for base in shared for name in base.model_fields}


@pytest.mark.parametrize("body", TABLES, ids=lambda body: body.__name__)
def test_every_field_of_a_body_stands_in_its_table(body: type[Body]) -> None:
    rows = DOCS.tables("What a request may set")[TABLES.index(body)]
    assert {name for first, *_ in rows for name in named(first)} == own(body)


def test_every_path_stands_in_the_first_table() -> None:
    async def metrics() -> str:
        return ""

    nothing: Any = None  # the paths are there whatever is served
    paths = build_app(nothing, lambda *_: None, metrics).openapi()["paths"]
    served = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    (rows,) = DOCS.tables("What it offers")
    listed = {name for first, *_ in rows for name in named(first)} - {"GET /docs"}
    assert listed | {path.replace("/v1", "") for path in listed if "tokenize" in path} == served


def test_its_recipe_is_one_and_its_defaults_are_all() -> None:
    (block,) = re.findall(r"^```yaml\n(.*?)^```", DOCS.text, re.DOTALL | re.MULTILINE)
    recipe = validate(ServeRecipe, {"name": "x", **yaml.safe_load(block)})
    assert recipe.aliases["gpt-4o"] == "swarm" and recipe.defaults["gpt-4o"].temperature == 0.2
    text = DOCS.section("Names and defaults").partition("model's: ")[2].partition(". Without")[0]
    assert named(text) == list(Defaults.model_fields)
