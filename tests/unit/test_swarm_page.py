"""docs/swarm.md is true: its tables are the code's, its recipe is one, its commands run, its numbers are the rule's."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import yaml
from typer.testing import CliRunner

from pipelines.swarm.rule import MEASURED, SHORTEST, Rule, Setting
from serve.api.answers import ledger_json
from serve.api.schema import UlmOptions
from serve.api.spent import CALLED, record_ledger
from serve.contracts import Call, Ledger
from tests.page import Page
from tests.written_corpus import write_corpus
from ulm import registry
from ulm.cli.main import app
from ulm.recipes import load_recipe
from ulm.recipes.serve import Budget, Limits, ServeRecipe
from ulm.recipes.train import SwarmAddRecipe, SwarmRecipe, TrainingRecipe

DOCS = Page.read("swarm.md")
PAGE, section, tables = DOCS.text, DOCS.section, DOCS.tables
EIGHT_KINDS = Setting(50.0, 8, 0.51)  # the centre of `ulm bench swarm`
KINDS = {
    "law": "court judge appeal statute",
    "code": "lambda return import class",
    "food": "bread soup salt oven",
    "music": "violin tempo chorus melody",
}
ROUNDING = 0.035  # of a ratio that the page says in words: a tenth, a fifth


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def test_every_field_of_a_swarms_recipe_stands_in_its_table_with_its_default():
    (rows,) = tables("Training")
    listed = {name.strip("`"): yaml.safe_load(default.strip("`")) for name, default, _ in rows}
    own = {name: field for name, field in SwarmRecipe.model_fields.items() if name not in TrainingRecipe.model_fields}
    defaults = {name: field.default for name, field in own.items() if name not in ("clustering", "evaluation")}
    assert listed == defaults
    assert "`clustering:` and `evaluation:` are sections of their own" in section("Training")


def test_every_strategy_stands_in_its_table_with_its_settings():
    rows, _ = tables("Answering")
    listed = {name.strip("`"): dict(re.findall(r"`(\w+): ([^`]+)`", settings)) for name, _, settings in rows}
    assert set(listed) == set(registry.kinds("strategy"))
    for kind, settings in listed.items():
        config = registry.configure("strategy", {"kind": kind}).model_dump(mode="json", exclude={"kind"})
        assert {name: yaml.safe_load(value) for name, value in settings.items()} == config, kind


def test_the_options_of_a_request_and_the_fields_of_a_serve_recipe_are_those_of_the_code():
    text = " ".join(section("Answering").split())
    options = re.search(r"A request may set (.*?) for itself", text)
    assert options and set(re.findall(r"`(\w+)`", options[1])) == set(UlmOptions.model_fields) - {"budget"}
    _, rows = tables("Answering")
    listed = {name.strip("`"): yaml.safe_load(default.strip("`")) for name, default, _ in rows}
    plain = ServeRecipe(name="plain", swarm="kinds").model_dump()
    defaults = {name: plain[name] for name in listed}
    defaults |= {"budget": Budget().model_dump(exclude_defaults=True)}
    defaults |= {"limits": Limits().model_dump(exclude_defaults=True)}
    assert listed == defaults
    limits = next(meaning for name, _, meaning in rows if name == "`limits`")
    assert set(re.findall(r"`(\w+)`", limits)) == set(Limits.model_fields)


def test_every_reason_of_a_call_and_every_metric_of_a_ledger_is_named():
    text = " ".join(section("Budget and ledger").split())
    assert [reason for reason in CALLED if reason not in text.partition("`why` is ")[2]] == []
    told = set()
    ledger = Ledger("route", [Call("e00", 1, "routed")], degraded=["cut short: no member is left to go on"])
    record_ledger(lambda metric, value, tags: told.add(metric), ledger)
    assert set(re.findall(r"`ray_(ulm_\w+)`", text)) == told


def test_the_recipe_of_one_expert_more_is_one(tmp_path):
    text = section("One expert more, or one fewer")
    indented = "".join(line[4:] for line in text.splitlines(keepends=True) if line.startswith("    "))
    (tmp_path / "add.yaml").write_text(indented, encoding="utf-8")
    assert cast(SwarmAddRecipe, load_recipe("swarm add", tmp_path / "add.yaml")).swarm == "kinds"


def test_bounds_and_ledger_are_those_of_the_code():
    bounds, ledger = tables("Budget and ledger")
    assert [row[0].strip("`") for row in bounds] == list(Budget.model_fields)
    assert [row[0].strip("`") for row in ledger] == list(ledger_json(Ledger("route")))
    calls = next(row[1] for row in ledger if row[0] == "`calls`")
    assert set(re.findall(r"`(\w+)`", calls)) == {field.name for field in dataclasses.fields(Call)}


def test_the_numbers_are_the_rules():
    text, rule = " ".join(section("When it pays").split()), Rule.fit()
    assert "that is 0.51 nats a token" in text and "from 1 token per parameter on" in text
    assert rule.pays_from(EIGHT_KINDS) == SHORTEST == 1
    for says, tokens in re.findall(r"at (0\.\d) (?:it is ahead )?from about (\d+)", text):
        assert rule.pays_from(replace(EIGHT_KINDS, information=float(says))) == pytest.approx(float(tokens), abs=0.5)
    said = {5: ("by 3 % at 5", 0.03), 20: ("a seventh at 20", 1 / 7), 50: ("a quarter at 50", 0.25)}
    for tokens, (words, ahead_by) in said.items():
        assert words in text
        ratio = rule.forecast(replace(EIGHT_KINDS, tokens_per_parameter=float(tokens))).ratio
        assert ratio == pytest.approx(1 - ahead_by, abs=ROUNDING)
    ratios = {m.setting.experts: m.ratio for m in MEASURED if m.setting.tokens_per_parameter == 50 and m.ratio < 1}
    assert ratios[8] < min(ratios[4], ratios[16]) and "8 are better than 4, and than 16" in text


def test_the_plot_of_the_page_is_there():
    (path,) = re.findall(r"!\[[^]]+\]\(([^)]+)\)", PAGE)
    assert (Path(__file__).parents[2] / "docs" / path).is_file()


def test_the_recipe_of_the_page_is_planned_by_the_commands_of_the_page(tmp_path, monkeypatch):
    generator = random.Random(0)
    documents = [
        (kind, ("train", "train", "val", "test")[n % 4], " ".join(generator.choices(words.split(), k=300)))
        for n in range(40)
        for kind, words in KINDS.items()
    ]
    write_corpus(tmp_path / "home", documents, name="topics")
    monkeypatch.setenv("ULM_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (text,) = blocks("yaml")
    Path("swarm.yaml").write_text(text, encoding="utf-8")
    assert isinstance(load_recipe("swarm train", Path("swarm.yaml")), SwarmRecipe)
    commands = [shlex.split(line[2:])[1:] for block in blocks("console") for line in block.splitlines()]
    done = [CliRunner().invoke(app, words, catch_exceptions=False) for words in commands]
    first, second = (json.loads(it.stdout.splitlines()[-1]) for it in done)
    assert (first["experts"], second["experts"]) == (4, 2)
    assert second["tokens_per_parameter"] == pytest.approx(50, rel=0.01)  # rounded up to a whole step
