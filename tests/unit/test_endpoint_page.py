"""docs/endpoint.md is true: its tables are the bodies' fields and the application's paths, its recipe is one."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml

from serve import constrained
from serve.api import access, refusals
from serve.api.openai import build_app
from serve.api.responses import ResponsesBody
from serve.api.schema import Body, ChatBody, ChoicesBody, CompletionBody, GenerationBody
from serve.graph import SPARE
from serve.member import HEALTH_PERIOD_S
from tests.page import Page
from ulm.metrics import METRICS
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


def test_its_json_is_a_chat_and_the_keywords_are_those_that_a_schema_may_use() -> None:
    section = DOCS.section("JSON")
    (block,) = re.findall(r"^```json\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    asked = ChatBody.model_validate_json(block)
    assert asked.more()["json_schema"] == constrained.schema_text(
        json.loads(block)["response_format"]["json_schema"]["schema"]
    )
    assert constrained.check_schema(asked.more()["json_schema"]) is False
    (rows,) = DOCS.tables("JSON")
    listed = {name for first, *_ in rows for name in named(first)}
    known = constrained.OF_SCHEMAS | constrained.LISTS | constrained.NESTED | constrained.PLAIN | constrained.REMARKS
    assert listed == known
    bounds = (constrained.MAX_SCHEMA_BYTES, constrained.MAX_DEPTH, constrained.MAX_BRANCHES)
    assert "{:,} bytes and {} levels, and {} branches".format(*bounds) in section


def test_its_recipe_is_one_and_its_defaults_are_all() -> None:
    (block,) = re.findall(r"^```yaml\n(.*?)^```", DOCS.text, re.DOTALL | re.MULTILINE)
    recipe = validate(ServeRecipe, {"name": "x", **yaml.safe_load(block)})
    assert recipe.aliases["gpt-4o"] == "swarm" and recipe.defaults["gpt-4o"].temperature == 0.2
    text = DOCS.section("Names and defaults").partition("model's: ")[2].partition(". Without")[0]
    assert named(text) == list(Defaults.model_fields)


def test_its_settings_under_load_are_the_recipes_and_its_metrics_are_declared() -> None:
    settings, metrics = DOCS.tables("Under load")
    for name, default, _ in settings:
        assert str(ServeRecipe.model_fields[name.strip("`")].default) == default
    assert {name.strip("`") for name, _ in metrics} <= set(METRICS)
    meaning = {name.strip("`"): named(said) for name, said in metrics}
    whys = {*access.WHY.values(), *refusals.WHY.values(), *refusals.WHY_STATUS.values(), refusals.GATEWAY_FULL}
    assert set(meaning["ulm_requests_refused_total"]) == whys
    text = " ".join(DOCS.section("Under load").split())
    assert f"there {SPARE} requests more than `max_open` may wait for a gateway" in text
    assert f"asks every engine and gateway every {HEALTH_PERIOD_S:g} seconds" in text
