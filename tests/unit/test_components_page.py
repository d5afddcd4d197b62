"""docs/components.md is true: its tables are the code's, its commands run, its refusals are the ones given."""

from __future__ import annotations

import io
import json
import re
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from typer.testing import CliRunner

import ulm
from ulm import registry
from ulm.cli.main import app
from ulm.components.position.rope import Scaling
from ulm.errors import ConfigError
from ulm.models.account import cache_bytes
from ulm.recipes.base import validate
from ulm.recipes.train import TrainRecipe
from ulm.spec import SLOTS, preset_sizes

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/components.md").read_text(encoding="utf-8")
ALL_SLOTS = (*SLOTS, "mask", "optimizer", "schedule")


def section(heading: str, level: int = 2) -> str:
    text = PAGE.partition(f"\n{'#' * level} {heading}\n")[2]
    assert text, heading
    return re.split(rf"^#{{1,{level}}} ", text, maxsplit=1, flags=re.MULTILINE)[0]


def rows(text: str) -> list[list[str]]:
    """The cells of a section's table, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


RECIPES = {re.match(r"# (\S+)\n", block)[1]: block for block in blocks("yaml")}  # type: ignore[index]
COMMANDS = [line.removeprefix("$ ") for block in blocks("console") for line in block.splitlines()]


@pytest.mark.parametrize("slot", ALL_SLOTS)
def test_a_table_lists_exactly_the_kinds_of_a_slot_with_all_settings_and_their_defaults(slot):
    text = section(slot, 3)
    common = yaml.safe_load(found[1]) if (found := re.match(r"\nAll kinds have `(.*?)`", text)) else {}
    listed = {}
    for kind, settings, _, _ in rows(text):
        of_kind = yaml.safe_load(settings.strip("`"))
        assert not common.keys() & of_kind.keys()
        listed[kind.strip("`")] = common | of_kind
    assert sorted(listed) == ulm.kinds(slot)
    for kind, settings in listed.items():
        fields = registry.find(slot, kind).Config.model_fields
        assert settings == {name: field.default for name, field in fields.items() if name != "kind"}, kind


@pytest.mark.parametrize("slot", ALL_SLOTS)
def test_the_paper_of_a_row_is_one_that_the_kinds_own_file_cites(slot):
    for kind, _, _, paper in rows(section(slot, 3)):
        text = Path(import_module(f"ulm.components.{slot}.{kind.strip('`')}").__file__).read_text(encoding="utf-8")  # type: ignore[arg-type]
        if not paper:
            assert "arXiv" not in text, f"{kind} has a paper"
            continue
        (number, address) = re.fullmatch(r"\[(\S+)\]\(https://arxiv.org/abs/(\S+)\)", paper).groups()  # type: ignore[union-attr]
        assert number == address and number in text, kind


def test_the_fields_of_a_spec_and_of_ropes_scaling_are_all_named():
    named = {name for cells in rows(section("What is no slot")) for name in re.findall(r"`(\w+)`", cells[0])}
    assert named | set(SLOTS) == set(ulm.ModelSpec.model_fields)
    text = section("position", 3)
    assert not [name for name in Scaling.model_fields if not re.search(rf"\b{name}\b", text)]
    nested = {
        type_
        for slot in ALL_SLOTS
        for kind in ulm.kinds(slot)
        for field in registry.find(slot, kind).Config.model_fields.values()
        for type_ in (field.annotation, *getattr(field.annotation, "__args__", ()))
        if isinstance(type_, type) and issubclass(type_, BaseModel)
    }
    assert nested == {Scaling}  # another one would need its own words on the page


def test_defaults_of_a_spec_are_as_the_page_says():
    fields = ulm.ModelSpec.model_fields
    for names, default, _ in rows(section("What is no slot")):
        if "preset" in default or names == "`mask`":
            continue
        found = [fields[name].default for name in re.findall(r"`(\w+)`", names)]
        said = [yaml.safe_load(part.strip("` ")) for part in default.split(", ")]
        assert said == [list(value) if isinstance(value, tuple) else value for value in found]
    assert [config.kind for config in ulm.ModelSpec.preset("nano").mask] == ["causal"]


def test_masks_and_additions_to_scores_are_what_the_kinds_say():
    told = {kind.strip("`"): (masks, adds) for kind, masks, adds in rows(section("Who may look at whom"))}
    assert sorted(told) == ulm.kinds("attention")
    for kind, (masks, adds) in told.items():
        cls = registry.find("attention", kind)
        assert masks == ", ".join(sorted(cls.masks)), kind
        assert adds == ("yes" if cls.takes_bias else "no"), kind
    biased = [kind for kind in ulm.kinds("position") if registry.find("position", kind).has_bias]
    assert biased == ["alibi", "t5"]


def test_what_decoding_keeps_grows_or_is_bounded_as_the_page_says():
    told = {kind.strip("`"): memory for kind, memory, _ in rows(section("What decoding keeps"))}
    in_decoders = [k for k in ulm.kinds("attention") if not registry.find("attention", k).needs_source]
    assert sorted(told) == in_decoders
    of_nano = {"num_kv_heads": 1, "head_dim": 32, "num_layers": 3}
    sums = of_nano["num_layers"] * of_nano["num_kv_heads"] * (of_nano["head_dim"] + 1) * 4  # bytes, for each feature
    for kind, memory in told.items():
        held = cache_bytes(ulm.ModelSpec.preset("nano", context_tokens=1024, attention=kind))
        assert memory == ("grows" if held.per_token else "bounded"), kind
        if kind == "gqa":
            assert held.per_token == 3 * 2 * 1 * 32 * 2  # layers, keys and values, heads, width, bytes of bfloat16
        if kind in ("linear", "performer"):
            assert held.fixed == sums * (32 if kind == "linear" else 64)


def over_nano(cell: str) -> dict[str, Any]:
    return yaml.safe_load(cell.strip("`"))


@pytest.mark.parametrize(("recipe", "answer"), rows(section("What does not go together")), ids=lambda cell: cell[:60])
def test_a_refusal_of_the_page_is_the_one_given(recipe, answer):
    with pytest.raises(ConfigError) as caught:
        ulm.ModelSpec.preset("nano", **over_nano(recipe))
    assert str(caught.value) == answer


def test_all_presets_are_listed():
    assert [name.strip("`") for name, _ in rows(section("Presets"))] == sorted(preset_sizes())


def test_the_recipe_for_training_is_one():
    recipe = validate(TrainRecipe, {"name": "train", **yaml.safe_load(RECIPES["train.yaml"])})
    assert ulm.ModelSpec.parse(recipe.model).attention.window_tokens == 64
    assert (recipe.optimizer["kind"], recipe.schedule["decay_share"]) == ("lion", 0.5)


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """What every command of the page ends with, run where its recipes are written."""
    folder = tmp_path_factory.mktemp("page")
    for name, text in RECIPES.items():
        (folder / name).write_text(text, encoding="utf-8")
    results = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("ULM_HOME", str(folder / "home"))
        for command in COMMANDS:
            program, *words = command.split()
            assert program == "ulm"
            done = CliRunner().invoke(app, words, catch_exceptions=False)
            assert done.exit_code == 0, done.stderr
            results[command] = json.loads(done.stdout.splitlines()[-1])
    return results


def test_every_command_of_the_page_runs_and_every_recipe_is_shown(shown):
    assert len(shown) >= 7
    assert {f"ulm show {name}" for name in RECIPES if name != "train.yaml"} <= shown.keys()


def test_the_commands_show_what_the_page_says_of_them(shown):
    nano, sliding = shown["ulm show nano"], shown["ulm show sliding.yaml"]
    assert nano["parameters"] == sliding["parameters"]
    assert sliding["spec"]["attention"] | {"num_heads": 3, "num_kv_heads": 1} == sliding["spec"]["attention"]
    assert (nano["cache_bytes_per_token"] > 0, sliding["cache_bytes_per_token"]) == (True, 0)
    pattern = shown["ulm show pattern.yaml"]
    with_window = pattern["cache_bytes_per_token"] / nano["cache_bytes_per_token"]
    assert with_window == 2 / 3  # two of eight layers see everything, where nano has three
    shared = shown["ulm show shared.yaml"]
    assert shared["spec"]["num_layers"] == 2 * 3
    kinds = {preset: {slot: spec["spec"][slot]["kind"] for slot in SLOTS} for preset, spec in shown.items()}
    assert kinds["ulm show gpt2-like/nano"]["norm"] == "layernorm"
    assert (
        kinds["ulm show modern/mini"] | {"embedding": "value", "feedforward": "relu2"} == kinds["ulm show modern/mini"]
    )
    assert 24e6 < shown["ulm show 25M"]["parameters"] < 26e6


def test_the_python_of_the_page_runs():
    (code,) = blocks("python")
    out = io.StringIO()
    with redirect_stdout(out):
        exec(compile(code, "docs/components.md", "exec"), {})
    lines = out.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["gqa", "sliding", "linear", "performer"]
    assert all("[1, 100, 8192]" in line for line in lines)
