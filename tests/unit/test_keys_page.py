"""docs/keys.md and docs/security.md are true: the recipe is one, the tables name all there is, the tests exist."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from serve.api.access import OPEN
from serve.api.request_log import RequestLog
from tests.page import Page
from ulm import errors
from ulm.cli.main import app
from ulm.recipes.base import validate
from ulm.recipes.serve import ServeRecipe

ROOT = Path(__file__).parents[2]
KEYS, SECURITY = Page.read("keys.md"), Page.read("security.md")
FIELDS = {"keys", "database", "counters", "tls", "cors", "request_log"}


def named(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def table(text: str) -> list[list[str]]:
    (found,) = re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found.splitlines()[2:]]


def test_its_recipe_is_one_and_its_fields_are_all_there_is() -> None:
    before = KEYS.text.partition("\n## Keys")[0]
    (block,) = re.findall(r"^```yaml\n(.*?)^```", before, re.DOTALL | re.MULTILINE)
    recipe = validate(ServeRecipe, {"name": "x", **yaml.safe_load(block)})
    assert recipe.keys and recipe.cors is not None and recipe.tls is not None
    assert {named(first)[0] for first, _ in table(before)} == FIELDS <= set(ServeRecipe.model_fields)


def test_every_option_of_create_stands_in_its_table_and_update_takes_them_all() -> None:
    command: Any = typer.main.get_command(app)
    verbs = command.commands["keys"].commands
    create, update = (
        {name for parameter in verbs[verb].params for name in parameter.opts if name.startswith("--")} - {"--help"}
        for verb in ("create", "update")
    )
    ((*_, rows),) = [KEYS.tables("Keys")]
    assert {named(first)[0] for first, _ in rows} == create == update


def test_every_refusal_of_a_key_stands_in_its_table() -> None:
    (rows,) = KEYS.tables("What counts")
    told = {(int(status), named(code)[0] if named(code) else None) for status, code, _ in rows}
    made = [errors.InvalidKeyError(""), errors.ScopeError(""), errors.QuotaError(""), errors.UnavailableError("")]
    made += [errors.ModelNotFoundError("", code="model_not_found"), errors.RateLimitError("", kind="tokens")]
    assert told == {(error.status, error.code) for error in made}


def test_the_open_paths_and_the_fields_of_the_log_are_named() -> None:
    assert set(OPEN) <= set(named(KEYS.section("Keys").rpartition("```")[2]))
    source = inspect.getsource(RequestLog.write)
    written = set(re.findall(r'^\s+"(\w+)": ', source, re.MULTILINE))
    first = KEYS.section("The request log").partition(", and nothing")[0]
    assert written == set(named(first)) - {"x-request-id"}


@pytest.mark.parametrize("row", table(SECURITY.text), ids=lambda row: row[2])
def test_every_boundary_names_a_test_that_there_is(row: list[str]) -> None:
    path, _, name = named(row[2])[0].partition("::")
    functions = ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8")))
    assert name in {node.name for node in functions if isinstance(node, ast.FunctionDef)}
